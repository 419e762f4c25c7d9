"""LoRA adapters: put into a network to be trained, written, read, and merged into weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, section 4.1): a weight W becomes
W + alpha / rank B A. The layers that are trained are peft's. Read as peft writes them (adapter_config.json and
adapter_model.safetensors) and as diffusers does (pytorch_lora_weights.safetensors, with `transformer.` and
`text_encoder.` before the names); written in both forms.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raymuse.config.errors import UserError

DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
_FILES, _CONFIG = (PEFT, DIFFUSERS), "adapter_config.json"
_HALF = re.compile(r"\.(lora_[AB])\.default\.weight$")  # as peft names what it trains
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
        config = file.with_name(_CONFIG)
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
                # In fp32, also where the weight is not: it is then rounded once.
                weight.copy_(weight.float().add(change.to(weight.device).view(weight.shape), alpha=scale))


def insert(network: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put trainable layers into a network whose own weights stay as they are, in place. B starts at 0.

    Args:
        rank, alpha: of every change alpha / rank B A.
        targets: linears and convolutions, by their names' ends, e.g. "to_q".
        seed: of A, drawn as peft does (Kaiming uniform).

    Raises:
        UserError: no layer has such a name, or one that has is neither linear nor convolution.
    """
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), network)
        except ValueError as error:
            raise UserError(f"lora targets {', '.join(targets)}: {str(error).splitlines()[0]}") from error
    for target in targets:
        if not any(f".{name}".endswith(f".{target}.lora_A") for name, _ in network.named_modules()):
            raise UserError(f"lora targets: no layer is named {target}")


def adapter_sha256(address: str) -> str:
    """sha256 (hex) of an adapter's weights and config. Raises UserError where there is none."""
    weights = _file(Path(address))
    digest = hashlib.sha256()
    for path in (weights, weights.with_name(_CONFIG)):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def save(parts: Mapping[str, Mapping[str, Tensor]], alpha: float, folder: Path) -> None:
    """Write what was trained, of each network ("transformer", "text_encoder", "superres") under its own names.

        pytorch_lora_weights.safetensors                         all: diffusers and this project read it
        transformer/adapter_config.json, adapter_model.safetensors, ...      one network each: peft reads it

    alpha / rank is counted into B and the files say alpha = rank: diffusers' form has no place for another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged: dict[str, Tensor] = {}
    for part, weights in parts.items():
        halves = {_HALF.sub(r".\1.weight", name): value for name, value in weights.items()}
        rank = next(value.shape[0] for name, value in halves.items() if name.endswith("lora_A.weight"))
        halves = {
            name: (value * (alpha / rank) if name.endswith("lora_B.weight") else value).contiguous()
            for name, value in halves.items()
        }
        merged |= {f"{part}.{name}": value for name, value in halves.items()}
        layers = sorted({name.rpartition(".lora_")[0] for name in halves})
        facts = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": layers}
        own = folder / part
        own.mkdir(exist_ok=True)
        (own / _CONFIG).write_text(json.dumps(facts, indent=2) + "\n")
        save_file({f"base_model.model.{name}": value for name, value in halves.items()}, own / PEFT, {"format": "pt"})
    save_file(merged, folder / DIFFUSERS, {"format": "pt"})


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
