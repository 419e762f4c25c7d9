"""LoRA adapters, merged into the weights of a network (Hu et al., arXiv 2106.09685, section 4.1).

Read as peft writes them (adapter_config.json and adapter_model.safetensors) and as diffusers does
(pytorch_lora_weights.safetensors, with `transformer.` and `text_encoder.` before the names).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from raymuse.config.errors import UserError

_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_NAME = re.compile(
    r"^(?:base_model\.model\.)?(?:(?P<part>transformer|text_encoder|superres)\.)?(?P<layer>.+?)"
    r"\.(?P<half>lora_A|lora_B|lora\.down|lora\.up|alpha)(?:\.default)?(?:\.weight)?$"
)
_HALVES = {"lora_A": "down", "lora.down": "down", "lora_B": "up", "lora.up": "up", "alpha": "alpha"}


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds, by network ("transformer", "text_encoder", "superres") and layer: the full matrices."""

    name: str
    changes: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def load(cls, address: str) -> "Adapter":
        """From a folder, or its safetensors file.

        Raises:
            UserError: for what is missing, pickled, damaged, no LoRA, or half of one.
        """
        file = _file(Path(address))
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        config = file.with_name("adapter_config.json")
        facts = json.loads(config.read_text()) if config.exists() else {}
        layers: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (match := _NAME.match(name)) is None:
                raise UserError(f"{file}: {name} is no weight of a LoRA (lora_A, lora_B): other adapters are not read.")
            place = (match["part"] or "transformer", match["layer"])
            layers.setdefault(place, {})[_HALVES[match["half"]]] = tensor.float()
        changes: dict[str, dict[str, Tensor]] = {}
        for (part, layer), halves in layers.items():
            changes.setdefault(part, {})[layer] = _change(file, layer, halves, facts)
        return cls(address, changes)

    def merge(self, network: nn.Module, part: str, scale: float) -> None:
        """Add `scale` times the adapter to the weights of a network, in place.

        Raises:
            UserError: for a layer that the network lacks, or of another shape.
        """
        weights = dict(network.named_parameters())
        for layer, change in self.changes.get(part, {}).items():
            weight = weights.get(f"{layer}.weight")
            if weight is None:
                raise UserError(f"{self.name} was made for another model: this one has no layer {layer} in {part}.")
            if weight.shape.numel() != change.numel() or weight.shape[0] != change.shape[0]:
                raise UserError(
                    f"{self.name} was made for another model: {layer} is {tuple(weight.shape)} here and "
                    f"{tuple(change.shape)} there."
                )
            with torch.no_grad():
                weight.add_(change.to(weight).view(weight.shape), alpha=scale)


def _file(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    for name in _FILES:
        if (path / name).exists():
            return path / name
    pickled = path.suffix == ".bin" or any(path.glob("*.bin"))
    raise UserError(
        f"{path} holds no LoRA: neither {' nor '.join(_FILES)}"
        + (" (a .bin is a pickle, which can run code and is not read: save it as safetensors)." if pickled else ".")
    )


def _change(file: Path, layer: str, halves: Mapping[str, Tensor], facts: Mapping[str, object]) -> Tensor:
    """alpha / rank B A; divided by the root of the rank for a rank-stabilised one."""
    if not {"down", "up"} <= halves.keys():
        raise UserError(f"{file}: of {layer} one half is missing: a LoRA has lora_A and lora_B.")
    down, up = halves["down"].flatten(1), halves["up"].flatten(1)
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise UserError(f"{file}: the halves of {layer} do not fit: ranks {rank} and {up.shape[1]}.")
    alpha = float(halves["alpha"]) if "alpha" in halves else _alpha(layer, facts, rank)
    return alpha / (rank**0.5 if facts.get("use_rslora") else rank) * (up @ down)


def _alpha(layer: str, facts: Mapping[str, object], rank: int) -> float:
    """peft's: of the first pattern that ends the layer's name, else of all; without a config the rank, so 1."""
    patterns = facts.get("alpha_pattern")
    for pattern, alpha in (patterns if isinstance(patterns, dict) else {}).items():
        if re.search(rf"(^|\.){pattern}$", layer):
            return float(alpha)
    given = facts.get("lora_alpha", rank)
    return float(given) if isinstance(given, int | float) else float(rank)
