"""The model folder: diffusers' layout with what ours adds, read and written.

transformer/ vqvae/ text_encoder/ tokenizer/ scheduler/     as diffusers has them, safetensors only
critic/                                                     a token critic of the base's ids
superres/ superres_vqvae/                                   of a cascade; the second where it has a VQGAN of its own
generation_config.json                                      how the weights are best drawn from
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from raymuse.config.errors import UserError
from raymuse.config.sampling import SamplingConfig
from raymuse.drawing.remote_model import fetched
from raymuse.models.base import Base, BaseShape, new_base, read_shape
from raymuse.models.lora import adapter_sha256
from raymuse.models.network_files import load_weights, read_config
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVitConfig
from raymuse.models.weights import HUB, hub_id, weights_sha256

SETTINGS = "generation_config.json"


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
    def load(cls, folder: Path, transformer: BaseShape, factor: int) -> Self:
        """From the folder; a plain diffusers folder has none and gets aMUSEd's defaults for its size.

        Raises:
            UserError: a folder of ours without them.
        """
        path = folder / SETTINGS
        if not path.exists():
            if not isinstance(transformer, UVitConfig):
                raise UserError(f"{folder} has no {SETTINGS}: `raymuse export` writes it with the rest of the folder.")
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


def load_base(folder: Path, device: str = "cpu", variant: str | None = None) -> Base:
    """A base transformer, aMUSEd's or Muse's, from a folder with config.json and safetensors."""
    network = new_base(read_shape(read_config(folder, "transformer", variant)))
    load_weights(network, folder, variant)
    return network.eval().requires_grad_(False).to(device)


def load_superres(folder: Path, device: str = "cpu", variant: str | None = None) -> SuperRes:
    """A super-resolution transformer from its folder."""
    network = SuperRes(SuperResConfig.from_dict(read_config(folder, "superres", variant)))
    load_weights(network, folder, variant)
    return network.eval().requires_grad_(False).to(device)


def trained_part(address: str, part: str, chosen: str = "model") -> Path:
    """The folder of a network: that part of a model folder, or what a finished training left (`model`, `model_raw`).

    Raises:
        UserError: the training is not at its end, or trained a LoRA.
    """
    folder = local_folder(address) if address.startswith(HUB) or in_a_store(address) else Path(address)
    if (folder / "model_index.json").exists():
        return folder / part
    if not (folder / "_SUCCESS").exists():
        raise UserError(f"{address} is not trained to the end. Run `raymuse train` again to go on.")
    if not (folder / "model/config.json").exists():
        raise UserError(f"{address} holds a LoRA: give the model that it changes here, and lora={address}/model.")
    wanted = folder / chosen  # a training without an average has only `model`
    return wanted if wanted.exists() else folder / "model"


def local_folder(folder_or_id: str) -> Path:
    """The model folder on this disk. A Hugging Face id is downloaded, safetensors only, and so is an address."""
    if in_a_store(folder_or_id):
        folder_or_id = str(fetched(folder_or_id))
    folder = Path(folder_or_id)
    name = hub_id(folder_or_id, "transformer")
    if name is not None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    for part in ("transformer", "vqvae", "text_encoder", "tokenizer"):
        if not (folder / part).exists():
            raise UserError(f"{folder_or_id} has no {part}/: it is no model folder. `raymuse export` writes one.")
    return folder


def in_a_store(address: str) -> bool:
    """Whether it is an fsspec address such as `s3://bucket/model`, and neither a folder nor a Hugging Face id."""
    return "://" in address and not address.startswith(HUB)


def model_sha256(folder_or_id: str, adapters: Mapping[str, float] | None = None) -> str:
    """One sha256 (hex) for everything that decides the pictures: all weights, and how they are drawn from.

    Args:
        adapters: LoRAs that are merged, by address and scale.
    """
    folder_or_id = str(local_folder(folder_or_id)) if in_a_store(folder_or_id) else folder_or_id
    folder = Path(folder_or_id)
    own = [part for part in ("superres", "superres_vqvae", "critic") if (folder / part).exists()]
    sums = {part: weights_sha256(folder_or_id, part) for part in ("transformer", "vqvae", "text_encoder", *own)}
    if (settings := folder / SETTINGS).exists():
        sums["settings"] = hashlib.sha256(settings.read_bytes()).hexdigest()
    for number, (address, scale) in enumerate((adapters or {}).items()):
        sums[f"lora {number}"] = f"{adapter_sha256(address)} {scale}"
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def check_widths(name: str, part: str, config: BaseShape | SuperResConfig, codes: int, text: TextEncoder) -> None:
    """Raise UserError where a transformer was made for another VQGAN or another text encoder."""
    wanted = {"codebook_size": codes, "encoder_hidden_size": text.width}
    if isinstance(config, UVitConfig):
        wanted["cond_embed_dim"] = text.pooled_width
    wrong = [
        f"{field} is {getattr(config, field)} and must be {value}"
        for field, value in wanted.items()
        if getattr(config, field) != value
    ]
    if wrong:
        raise UserError(
            f"{name}: {part}/ does not belong to this VQGAN and text encoder: {', '.join(wrong)}. "
            "Use the parts that it was trained with."
        )
