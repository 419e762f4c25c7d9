"""What the stages of a recipe have to count: multiply-adds a picture, and core seconds, without data or weights.

The figures are those of the networks themselves, run where nothing is computed (training/measure.py; torch's meta
device): 2 FLOP a multiply-add, one sample, all its ids masked, so that every place has logits.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from raymuse.clusters.placement import Work
from raymuse.config.generate import GenerateConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig, ClipConfig, LoraConfig, SuperresConfig, VqganConfig
from raymuse.models.base import SHAPES, BaseShape
from raymuse.models.superres import SuperResConfig
from raymuse.models.uvit import UVitConfig
from raymuse.models.vqmodel import VqModel, VqModelConfig
from raymuse.training import measure
from raymuse.training.measure import CLIP_TOKENS, CLIP_WIDTHS, T5_TOKENS

BACKWARD = 3.0  # forward and backward over forward, where only the forward pass is counted


@dataclass(frozen=True)
class Text:
    """A text encoder of CLIP's kind, as what tells the networks. The defaults are CLIP-L's.

    Attributes:
        tokens: of a caption.
        pooled: width of its pooled vector.
    """

    width: int = 768
    layers: int = 12
    tokens: int = CLIP_TOKENS
    pooled: int = 768

    @property
    def gflop(self) -> float:
        """Of reading a caption: 12 width^2 numbers a layer and token, and attention's two products."""
        return self.layers * (24 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width) / 1e9


CLIP_L = Text()


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


def text_of(config: ClipConfig) -> Text:
    """The text tower that a train-clip makes."""
    from raymuse.training.clip import SHAPE  # which brings transformers: seconds, that other plans need not take

    shape = {**SHAPE, **config.model}
    return Text(shape["width"], shape["layers"], config.text_length, shape["projection"])


def pretokenizing(
    config: PretokenizeConfig, pictures: int, vqgan: dict[str, Any] | None = None, text: Text = CLIP_L
) -> list[Piece]:
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
            vq + text.gflop,
            config.encoders,
            config.gpus_per_encoder,
            1.0,
            f"VQGAN {vq:,.1f} + text {text.gflop:.3g}",
        ),
    ]


def training(
    config: BaseConfig | SuperresConfig,
    resolution: int,
    low: int | None = None,
    vqgan: dict[str, Any] | None = None,
    text: Text | None = None,
) -> Piece:
    """Forward and backward of the base or the super-resolution model, with the text encoder where it runs along.

    Args:
        low: pixels of the low-res pictures under a super-resolution.
        vqgan: the shape of the VQGAN, where it is not aMUSEd's.
        text: the text encoder, where it is not one that the networks' text width tells (CLIP-L; else T5).
    """
    cells, lows = _cells(vqgan, resolution), 1
    shape: BaseShape | SuperResConfig
    if isinstance(config, SuperresConfig):
        lows = _cells(vqgan, low or resolution // 2)
        shape = superres_shape(config, cells, lows, vqgan, text)
    else:
        shape = base_shape(config, cells, vqgan, text)
    sizes = measure.Sizes(1, (cells, cells), _tokens(shape, text), low=(lows, lows))
    network = _gflop(shape, sizes, config.lora, False, True)
    again = _gflop(shape, sizes, config.lora, True, True) - network if config.gradient_checkpointing else 0.0
    reading = (text or CLIP_L).gflop if config.text_encoder else 0.0
    count, gpus = config.steps * config.batch_size, 1.0 if config.use_gpu else 0.0
    what = f"forward and backward {network:,.1f}" + (f" + forward again {again:,.1f}" if again else "")
    what += (f" + text {reading:.3g}" if reading else "") + (" (of a LoRA)" if config.lora else "")
    gflop = network + again + reading
    return Piece("train", "train", count, gflop, max(1, config.workers), gpus, config.cpus_per_worker, what)


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
    text: Text = CLIP_L,
) -> Piece:
    """Sampling steps of the base with guidance, text and the VQGAN's decoder; without `base`, aMUSEd's."""
    steps, cells = config.steps or 12, _cells(vqgan, resolution)
    forwards = steps * (1 if config.guidance == 1 else 2)
    shape = base_shape(base, cells, vqgan, text) if base else amused(resolution, cells)
    sizes = measure.Sizes(1, (cells, cells), _tokens(shape, text))
    network = _gflop(shape, sizes, None, False, False)
    decode = vqgan_gflop(vqgan, resolution, decode=True)
    whose = "" if base else " (aMUSEd's base)"
    what = f"{forwards} forwards{whose} x {network:,.1f} + decode {decode:,.1f} + text {text.gflop:.3g}"
    count = prompts * config.samples
    gflop = forwards * network + decode + text.gflop
    return Piece("draw", "draw", count, gflop, config.replicas, config.gpus_per_replica, config.cpus_per_replica, what)


def amused(resolution: int, cells: int) -> UVitConfig:
    """The shape of aMUSEd's base for a resolution: that of 512 pixels halves its grid inside."""
    halves = resolution >= 512
    return UVitConfig(sample_size=cells, downsample=halves, upsample=halves)


def resolution_of(config: BaseConfig | SuperresConfig | GenerateConfig) -> int:
    """Pixels that a recipe works at, as the published model that it names says: 256 where it names none."""
    named = config.start_from if isinstance(config, BaseConfig | SuperresConfig) else config.model
    return 512 if named and "512" in named.rpartition("/")[2] else 256


def base_shape(config: BaseConfig, cells: int, vqgan: dict[str, Any] | None, text: Text | None) -> BaseShape:
    """Of the recipe's `model` on a grid of `cells` a side; with start_from, of the aMUSEd model of its resolution."""
    if config.start_from:
        return amused(resolution_of(config), cells)
    known = _known(vqgan, text)
    if text and config.architecture == "uvit":
        known["cond_embed_dim"] = text.pooled
    return SHAPES[config.architecture](**{**known, **config.model, "sample_size": cells})


def superres_shape(
    config: SuperresConfig, cells: int, lows: int, vqgan: dict[str, Any] | None, text: Text | None
) -> SuperResConfig:
    """Of the recipe's `model` on a grid of `cells` a side over one of `lows`."""
    return SuperResConfig(**{**_known(vqgan, text), **config.model, "high_grid": cells, "low_grid": lows})


def _known(vqgan: dict[str, Any] | None, text: Text | None) -> dict[str, Any]:
    """What a flow's own VQGAN and text encoder decide of a network."""
    codes = VqModelConfig(**_tuples(vqgan)).num_vq_embeddings if vqgan else None
    sizes = {"codebook_size": codes, "vocab_size": codes + 64} if codes else {}
    return {**sizes, **({"encoder_hidden_size": text.width} if text else {})}


def _tokens(shape: BaseShape | SuperResConfig, text: Text | None) -> int:
    """Tokens that tell a network: those of a known text encoder, else of the one that has its width."""
    if text is not None:
        return text.tokens
    return CLIP_TOKENS if shape.encoder_hidden_size in CLIP_WIDTHS else T5_TOKENS


def _cells(vqgan: dict[str, Any] | None, resolution: int) -> int:
    return max(1, resolution // VqModelConfig(**_tuples(vqgan or {})).factor)


def vqgan_gflop(shape: dict[str, Any] | None, side: int, decode: bool) -> float:
    """GFLOP of a VQGAN's encoder, or decoder, on a square of `side` pixels."""
    return _vqgan(VqModelConfig(**_tuples(shape or {})), side, decode)


def _tuples(shape: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}


@functools.cache
def _gflop(
    shape: BaseShape | SuperResConfig, sizes: measure.Sizes, lora: LoraConfig | None, recompute: bool, backward: bool
) -> float:
    return measure.flops(shape, sizes, lora, recompute, backward) / 1e9


@functools.cache
def _vqgan(config: VqModelConfig, side: int, decode: bool) -> float:
    with torch.device("meta"):
        network = VqModel(config)
        width, cells = config.vq_embed_dim or config.latent_channels, side // config.factor
        codes, pixels = torch.empty(1, width, cells, cells), torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.draw(codes) if decode else network.latents(pixels)
    return float(counter.get_total_flops()) / 1e9
