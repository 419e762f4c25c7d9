"""What the stages of a recipe have to count: multiply-adds a picture, and core seconds, without data or weights.

The figures are those of the networks themselves, run on torch's meta device, where nothing is computed: 2 FLOP a
multiply-add, the first sample of a batch of one.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raymuse.clusters.placement import Work
from raymuse.config.generate import GenerateConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig, GeneratorConfig, SuperresConfig, VqganConfig
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.models.vqmodel import VqModel, VqModelConfig

CLIP_GFLOP = 13.3  # CLIP-L's text tower on 77 tokens; a smaller one counts less
TEXT_TOKENS = 77
BACKWARD = 3.0  # forward and backward over forward, where only the forward pass is counted
_DECODE = "decode"


@dataclass(frozen=True)
class Piece:
    """A kind of work of a stage.

    Attributes:
        what: for people.
        count: pictures, or samples.
        gflop: of each on a GPU (or core); None where it is a core's reading and decoding.
        workers: processes that do it at a time, as the recipe says.
        gpus: of one worker.
        cpus: of one worker.
        sum: how `gflop` came about, for people.
    """

    what: str
    work: Work
    count: int
    gflop: float | None
    workers: int
    gpus: float
    cpus: float
    sum: str = ""


def pretokenizing(config: PretokenizeConfig, pictures: int, vqgan: dict[str, Any] | None = None) -> list[Piece]:
    """Decode, and encode. `vqgan` is the shape of the VQGAN, where it is not aMUSEd's."""
    crops = pictures * config.crops_per_picture * (2 if config.flip else 1)
    sides = [config.resolution] + ([config.low_resolution] if config.low_resolution else [])
    vq = sum(vqgan_gflop(vqgan, side, decode=False) for side in sides)
    return [
        Piece("decode", "decode", pictures, None, config.decoders, 0.0, 1.0),
        Piece(
            "encode",
            "encode",
            crops,
            vq + CLIP_GFLOP,
            config.encoders,
            config.gpus_per_encoder,
            1.0,
            f"VQGAN {vq:,.1f} + text {CLIP_GFLOP}",
        ),
    ]


def training(
    config: GeneratorConfig, resolution: int, low: int | None = None, vqgan: dict[str, Any] | None = None
) -> Piece:
    """Forward and backward of the base or the super-resolution model, with the text encoder where it runs along."""
    cells = _cells(vqgan, resolution)
    if isinstance(config, SuperresConfig):
        low_cells = _cells(vqgan, low or resolution // 2)
        network = superres_gflop(config.model, cells, low_cells, backward=True)
        again = superres_gflop(config.model, cells, low_cells, backward=False)
    else:
        network = base_gflop(_base_shape(config), cells, backward=True)
        again = base_gflop(_base_shape(config), cells, backward=False)
    again = again if config.gradient_checkpointing else 0.0
    text = CLIP_GFLOP if config.text_encoder else 0.0
    count, gpus = config.steps * config.batch_size, 1.0 if config.use_gpu else 0.0
    what = f"forward and backward {network:,.1f}" + (f" + forward again {again:,.1f}" if again else "")
    what += (f" + text {text}" if text else "") + (" (as if all weights were trained)" if config.lora else "")
    return Piece(
        "train", "train", count, network + again + text, max(1, config.workers), gpus, config.cpus_per_worker, what
    )


def training_vqgan(config: VqganConfig) -> Piece:
    """Encoder and decoder, forward and backward, on the training crops."""
    both = vqgan_gflop(config.model, config.crop, False) + vqgan_gflop(config.model, config.crop, True)
    gpus = 1.0 if config.use_gpu else 0.0
    what = f"(encode + decode) {both:,.1f} x {BACKWARD:g}"
    return Piece(
        "train",
        "train",
        config.steps * config.batch_size,
        both * BACKWARD,
        max(1, config.workers),
        gpus,
        config.cpus_per_worker,
        what,
    )


def generating(
    config: GenerateConfig,
    prompts: int,
    resolution: int,
    base: BaseConfig | None = None,
    vqgan: dict[str, Any] | None = None,
) -> Piece:
    """Sampling steps with guidance, text and the VQGAN's decoder."""
    steps = config.steps or 12
    forwards = steps * (1 if config.guidance == 1 else 2)
    network = base_gflop(_base_shape(base) if base else shape_at(resolution), _cells(vqgan, resolution), backward=False)
    decode = vqgan_gflop(vqgan, resolution, decode=True)
    what = f"{forwards} forwards x {network:,.1f} + decode {decode:,.1f} + text {CLIP_GFLOP}"
    count = prompts * config.samples
    gflop = forwards * network + decode + CLIP_GFLOP
    return Piece("draw", "draw", count, gflop, config.replicas, config.gpus_per_replica, config.cpus_per_replica, what)


def shape_at(resolution: int) -> dict[str, Any]:
    """The shape of aMUSEd's base for a resolution: that of 512 pixels halves its grid inside."""
    return {"downsample": True, "upsample": True} if resolution >= 512 else {}


def resolution_of(config: GeneratorConfig | GenerateConfig) -> int:
    """Pixels that a recipe works at, as the published model that it names says: 256 where it names none."""
    named = config.start_from if isinstance(config, GeneratorConfig) else config.model
    return 512 if named and "512" in named.rpartition("/")[2] else 256


def _base_shape(config: GeneratorConfig) -> dict[str, Any]:
    return shape_at(resolution_of(config)) if config.start_from else dict(config.model)


def _cells(vqgan: dict[str, Any] | None, resolution: int) -> int:
    return max(1, resolution // VqModelConfig(**_tuples(vqgan or {})).factor)


def base_gflop(shape: dict[str, Any], cells: int, *, backward: bool) -> float:
    """GFLOP of a U-ViT on a grid of `cells` a side."""
    return _base(UVitConfig(**shape), cells, backward)


def superres_gflop(shape: dict[str, Any], cells: int, low: int, *, backward: bool) -> float:
    """GFLOP of a super-resolution transformer on a grid of `cells` a side over one of `low`."""
    grids = {"high_grid": cells, "low_grid": low}
    return _superres(SuperResConfig(**{**grids, **shape}), cells, low, backward)


def vqgan_gflop(shape: dict[str, Any] | None, side: int, decode: bool) -> float:
    """GFLOP of a VQGAN's encoder, or decoder, on a square of `side` pixels."""
    return _vqgan(VqModelConfig(**_tuples(shape or {})), side, decode)


def _tuples(shape: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}


@functools.cache
def _base(config: UVitConfig, cells: int, backward: bool) -> float:
    with torch.device("meta"):
        network = UVit(config)
        states = torch.empty(1, TEXT_TOKENS, config.encoder_hidden_size)
        inputs = (
            torch.zeros(1, cells, cells, dtype=torch.int64),
            states,
            torch.empty(1, config.cond_embed_dim),
            torch.empty(1, 5),
        )
    return _counted(network, inputs, backward)


@functools.cache
def _superres(config: SuperResConfig, cells: int, low: int, backward: bool) -> float:
    with torch.device("meta"):
        network = SuperRes(config)
        ids, low_ids = torch.zeros(1, cells, cells, dtype=torch.int64), torch.zeros(1, low, low, dtype=torch.int64)
        inputs = (ids, torch.empty(1, TEXT_TOKENS, config.encoder_hidden_size), low_ids)
    return _counted(network, inputs, backward)


@functools.cache
def _vqgan(config: VqModelConfig, side: int, decode: bool) -> float:
    with torch.device("meta"):
        network = VqModel(config)
        width, cells = config.vq_embed_dim or config.latent_channels, side // config.factor
        codes, pixels = torch.empty(1, width, cells, cells), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.draw(codes) if decode else network.latents(pixels)
    return float(counter.get_total_flops()) / 1e9


def _counted(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], backward: bool) -> float:
    with FlopCounterMode(display=False) as counter:
        if backward:
            network(*inputs).sum().backward()
        else:
            with torch.no_grad():
                network(*inputs)
    return float(counter.get_total_flops()) / 1e9
