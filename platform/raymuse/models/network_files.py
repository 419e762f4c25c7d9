"""A network's folder: config.json and safetensors under diffusers' names."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raymuse.config.errors import UserError
from raymuse.models.weights import require_safetensors, weight_files


def save_network(network: nn.Module, config: dict[str, Any], folder: Path, weights: dict[str, Tensor]) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors of a network, fp32, checked by loading."""
    network.load_state_dict(weights, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path, part: str, variant: str | None) -> dict[str, Any]:
    """A network's config.json. Raises UserError where it has no safetensors beside it."""
    require_safetensors(str(folder), part, variant)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def load_weights(network: nn.Module, folder: Path, variant: str | None) -> None:
    """Fill the network from the folder's safetensors. Raises UserError where they are damaged, or another's."""
    weights: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder, variant):
            weights.update(load_file(path))
        network.load_state_dict(weights, strict=True)
    except (RuntimeError, SafetensorError) as error:
        problems = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"{folder}: the weights are damaged, or not its config.json's: {problems[-1]}") from error
