"""One file with a network's weights: .safetensors, or what torch.save wrote, of which only tensors are read."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raymuse.config.errors import UserError


def require_file(address: str, hint: str) -> Path:
    """The file as a path. Raises UserError for one that is missing, ending with the hint."""
    if not Path(address).is_file():
        raise UserError(f"{address} is no file on this machine. {hint}")
    return Path(address)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name. A pickle's code is never run.

    Raises:
        UserError: the file is damaged, would run code, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as weights ({said}). Copy it again, or give .safetensors.") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, no state dict: save `network.state_dict()`.")
    return dict(state)


def take(state: dict[str, Tensor], name: str, shape: tuple[int, ...], address: str, what: str) -> Tensor:
    """One tensor of a file. Raises UserError where it is missing, of another shape, or not finite."""
    value = state.get(name)
    if not isinstance(value, Tensor):
        raise UserError(f"{address} has no {name}: it is not {what}.")
    if tuple(value.shape) != shape:
        raise UserError(f"{address}: {name} is {list(value.shape)}, not {list(shape)}: it is not {what}.")
    if not bool(value.isfinite().all()):
        raise UserError(f"{address}: {name} holds numbers that are not finite: copy the file again.")
    return value
