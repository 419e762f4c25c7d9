"""Prompts to pictures: the sampling loop, and the model folder that holds everything it needs.

    pipeline = Pipeline.load("runs/demo/model")
    drawn = pipeline(["a large red circle on a white background"], seeds=[7])
    drawn.images[0].save("circle.png")

A picture is a function of (weights, prompt, parameters, seed): its noise is drawn up front from its own generator, so
that neither its place in a batch nor the batch itself changes it. B pictures, L ids of one, C codes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raymuse.config.errors import UserError
from raymuse.config.export import SamplingConfig
from raymuse.masking import (
    CHOICE,
    CONFIDENCE,
    HIGH_CHOICE,
    HIGH_CONFIDENCE,
    guide,
    masked_counts,
    reveal,
    temperatures,
    uniforms,
)
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import hub_id, require_safetensors

SETTINGS = "generation_config.json"


class TokenTransformer(Protocol):
    """What the sampling loop needs of a base or super-resolution transformer."""

    config: Any

    def precompute(self, condition: Any) -> Any: ...

    def features(self, ids: Tensor, condition: Any) -> Tensor: ...

    def head(self, features: Tensor) -> Tensor: ...


def image_seed(run_seed: int, prompt: int, sample: int) -> int:
    """The seed of one picture of a run, from the run's seed and its place: 63 bits."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def sample_ids(
    network: TokenTransformer,
    conditional: Any,
    unconditional: Any | None,
    *,
    grid: tuple[int, int],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    streams: tuple[int, int] = (CHOICE, CONFIDENCE),
) -> Tensor:
    """Draw ids (B, h, w) from all masked, in `sampling.steps` steps (MaskGIT, section 3.2).

    Args:
        conditional: the network's condition for the prompts.
        unconditional: the same for the negative prompts; None draws without guidance.
        grid: (h, w).
        seeds: one a picture; all its noise follows from it.
        streams: which of the seed's streams pick codes and order them.
    """
    batch, length, mask_id = len(seeds), grid[0] * grid[1], int(network.config.mask_id)
    choice, confidence = (_noise(seeds, stream, sampling.steps, length) for stream in streams)
    counts = masked_counts(length, sampling.steps, sampling.masking)
    heats = temperatures(sampling.temperature, sampling.steps)
    conditional = network.precompute(conditional)
    unconditional = None if unconditional is None else network.precompute(unconditional)
    device = conditional.text.device
    ids = torch.full((batch, length), mask_id, device=device)
    for step in range(sampling.steps):
        logits = network.head(network.features(ids.view(batch, *grid), conditional))
        if unconditional is not None:
            free = network.head(network.features(ids.view(batch, *grid), unconditional))
            logits = guide(logits, free, sampling.guidance)
        ids = reveal(
            logits.view(batch, length, -1),
            ids,
            choice[step].to(device),
            confidence[step].to(device),
            torch.full((batch,), counts[step], device=device),
            torch.full((batch,), heats[step], device=device),
            mask_id=mask_id,
            top_p=sampling.top_p,
        )
    return ids.view(batch, *grid)


def _noise(seeds: Sequence[int], stream: int, steps: int, length: int) -> Tensor:
    """Uniforms (steps, B, L), each picture's from its own seed alone."""
    draws = np.stack([uniforms(seed, stream, range(steps), length) for seed in seeds], axis=1)
    return torch.from_numpy(draws)


@dataclass(frozen=True)
class Drawn:
    """Pictures of one call: uint8 (B, H, W, 3), with the base's own where a cascade drew them."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]
    ids: NDArray[np.int64]
    base_ids: NDArray[np.int64]

    @property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(pixels) for pixels in self.pixels]


@dataclass(frozen=True)
class Settings:
    """generation_config.json: how the weights are best drawn from."""

    base_size: int
    size: int
    micro_conditioning: tuple[float, float, float, float, float]
    base: SamplingConfig
    superres: SamplingConfig | None = None

    def save(self, folder: Path) -> None:
        record = {
            "base_size": self.base_size,
            "size": self.size,
            "micro_conditioning": list(self.micro_conditioning),
            "base": self.base.model_dump(),
            "superres": None if self.superres is None else self.superres.model_dump(),
        }
        (folder / SETTINGS).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, transformer: UVitConfig, factor: int) -> Self:
        """From the folder; a plain diffusers folder has none and gets aMUSEd's defaults for its size."""
        path = folder / SETTINGS
        if not path.exists():
            size = 512 if transformer.downsample else 256
            guidance = 10.0 if transformer.downsample else 4.0  # best FID per model (facts of the aMUSEd sweep)
            return cls(size, size, (size, size, 0, 0, 6), SamplingConfig(guidance=guidance))
        record = json.loads(path.read_text())
        m = record["micro_conditioning"]
        high = record["superres"]
        return cls(
            record["base_size"],
            record["size"],
            (m[0], m[1], m[2], m[3], m[4]),
            SamplingConfig(**record["base"]),
            None if high is None else SamplingConfig(**high),
        )


@dataclass(frozen=True)
class Pipeline:
    """Everything that draws: text encoder, base transformer, VQGAN, and super-resolution where there is one.

    Attributes:
        batch_size: rows that every network call is padded to, so that a picture does not depend on its batch.
    """

    vqgan: Vqgan
    text: TextEncoder
    base: UVit
    settings: Settings
    superres: SuperRes | None = None
    superres_vqgan: Vqgan | None = None
    batch_size: int = 16

    @classmethod
    def load(cls, folder_or_id: str, *, device: str = "cpu", batch_size: int = 16) -> Self:
        """Open a model folder (ours, or diffusers' aMUSEd layout) or a Hugging Face id.

        Raises:
            UserError: for a folder that is missing, incomplete, or holds pickled weights.
        """
        folder = _local_folder(folder_or_id)
        vqgan = Vqgan.load(str(folder), device)
        base = load_uvit(folder / "transformer", device)
        settings = Settings.load(folder, base.config, vqgan.factor)
        superres = superres_vqgan = None
        if (folder / "superres").exists():
            superres = load_superres(folder / "superres", device)
            own = folder / "superres_vqvae"
            superres_vqgan = Vqgan.load(str(own), device) if own.exists() else vqgan
        text = TextEncoder.load(str(folder), device)
        return cls(vqgan, text, base, settings, superres, superres_vqgan, batch_size)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] = "",
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
    ) -> Drawn:
        """Draw one picture a prompt.

        Args:
            prompts: B captions.
            negative: one for all, or one each.
            seeds: B seeds.
            steps, guidance, temperature: of the base; None takes the model's own. The super-resolution keeps its own.
        """
        if not prompts:
            raise UserError("no prompts: give one caption a picture")
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if not len(prompts) == len(seeds) == len(negatives):
            raise UserError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(negatives)} negative prompts differ")
        sampling = _override(self.settings.base, steps=steps, guidance=guidance, temperature=temperature)
        pieces = []
        for start in range(0, len(prompts), self.batch_size):
            stop = start + self.batch_size
            pieces.append(self._draw(prompts[start:stop], negatives[start:stop], seeds[start:stop], sampling))
        joined = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in Drawn.__annotations__}
        return Drawn(**joined)

    def _draw(
        self, prompts: Sequence[str], negatives: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Drawn:
        """One batch, padded to `batch_size` rows with empty prompts."""
        real, spare = len(prompts), self.batch_size - len(prompts)
        states, pooled = self.text([*prompts, *[""] * spare])
        free_states, free_pooled = self.text([*negatives, *[""] * spare])
        padded = [*seeds, *[0] * spare]
        base_ids = self._base_ids((states, pooled), (free_states, free_pooled), padded, sampling)
        base_pixels = self.vqgan.decode(base_ids)
        if self.superres is None or self.superres_vqgan is None:
            ids, pixels = base_ids, base_pixels
        else:
            ids = self._high_ids(states, free_states, base_ids, padded)
            pixels = self.superres_vqgan.decode(ids)
        return Drawn(pixels[:real], base_pixels[:real], ids[:real].cpu().numpy(), base_ids[:real].cpu().numpy())

    @torch.no_grad()
    def _base_ids(
        self, text: tuple[Tensor, Tensor], free: tuple[Tensor, Tensor], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        micro = torch.tensor([self.settings.micro_conditioning] * len(seeds), device=text[0].device)
        side = self.settings.base_size // self.vqgan.factor
        unconditional = self.base.condition(*free, micro) if sampling.guidance != 1 else None
        return sample_ids(
            self.base,
            self.base.condition(*text, micro),
            unconditional,
            grid=(side, side),
            seeds=seeds,
            sampling=sampling,
        )

    @torch.no_grad()
    def _high_ids(self, states: Tensor, free: Tensor, low_ids: Tensor, seeds: Sequence[int]) -> Tensor:
        assert self.superres is not None
        assert self.superres_vqgan is not None
        assert self.settings.superres is not None, "a model folder with superres/ says how to sample it"
        sampling = self.settings.superres
        side = self.settings.size // self.superres_vqgan.factor
        return sample_ids(
            self.superres,
            self.superres.condition(states, low_ids),
            self.superres.condition(free, low_ids) if sampling.guidance != 1 else None,
            grid=(side, side),
            seeds=seeds,
            sampling=sampling,
            streams=(HIGH_CHOICE, HIGH_CONFIDENCE),
        )


def save_network(network: nn.Module, config: dict[str, Any], folder: Path, weights: dict[str, Tensor]) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors of a transformer, fp32, checked by loading."""
    from safetensors.torch import save_file

    network.load_state_dict(weights, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def load_uvit(folder: Path, device: str = "cpu") -> UVit:
    """A base transformer from a folder with diffusers' config.json and safetensors."""
    config = _read_config(folder, "transformer")
    network = UVit(UVitConfig.from_diffusers(config))
    _load_weights(network, folder)
    return network.eval().requires_grad_(False).to(device)


def load_superres(folder: Path, device: str = "cpu") -> SuperRes:
    """A super-resolution transformer from its folder."""
    network = SuperRes(SuperResConfig.from_dict(_read_config(folder, "superres")))
    _load_weights(network, folder)
    return network.eval().requires_grad_(False).to(device)


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    require_safetensors(str(folder), part)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _load_weights(network: nn.Module, folder: Path) -> None:
    """Fill the network from the folder's safetensors (not the half-precision twins that some folders have)."""
    weights: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            if ".fp16." not in path.name:
                weights.update(load_file(path))
        network.load_state_dict(weights, strict=True)
    except (RuntimeError, SafetensorError) as error:
        problems = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"{folder}: the weights are damaged, or not its config.json's: {problems[-1]}") from error


def _local_folder(folder_or_id: str) -> Path:
    """The model folder on this disk; a Hugging Face id is downloaded, safetensors only."""
    folder = Path(folder_or_id)
    name = hub_id(folder_or_id, "transformer")
    if name is not None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    for part in ("transformer", "vqvae", "text_encoder", "tokenizer"):
        if not (folder / part).exists():
            raise UserError(f"{folder_or_id} has no {part}/: it is no model folder. `raymuse export` writes one.")
    return folder


def _override(sampling: SamplingConfig, **given: float | int | None) -> SamplingConfig:
    changes = {name: value for name, value in given.items() if value is not None}
    return SamplingConfig(**{**sampling.model_dump(), **changes})
