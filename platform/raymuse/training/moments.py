"""What an optimizer remembers of a parameter, by name."""

from typing import Any

import torch
from torch import Tensor, nn

from raymuse.training import adam8bit
from raymuse.training.lion import Lion
from raymuse.training.muon import is_muon


def moments(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """The names of each parameter's moments; before anything shards the parameters."""
    return {
        parameter: _names(optimizer, group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _names(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> tuple[str, ...]:
    if is_muon(group):
        return ("momentum_buffer",)
    if isinstance(optimizer, torch.optim.Adafactor):
        return ("row_var", "col_var") if parameter.ndim > 1 else ("variance",)
    if adam8bit.is_8bit(optimizer):
        return adam8bit.names(parameter)
    return ("exp_avg",) if isinstance(optimizer, Lion) else ("exp_avg", "exp_avg_sq")


def begin(optimizer: torch.optim.Optimizer, tensor: Tensor, names: tuple[str, ...]) -> None:
    """Zero moments and count of a tensor that the optimizer updates, as it makes them itself at its first step."""
    if adam8bit.is_8bit(optimizer):
        adam8bit.begin(optimizer, tensor)
        return
    zeros = {name: torch.zeros(_shape(tensor, name), device=tensor.device) for name in names}
    optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device), **zeros}


def _shape(tensor: Tensor, name: str) -> torch.Size:
    """Adafactor keeps the last two dimensions' means alone."""
    if name == "row_var":
        return torch.Size([*tensor.shape[:-1], 1])
    if name == "col_var":
        return torch.Size([*tensor.shape[:-2], 1, tensor.shape[-1]])
    return tensor.shape


def updates(optimizer: torch.optim.Optimizer) -> int:
    """Steps taken (the bias correction's count); 0 before the first."""
    first: dict[str, Any] = next(iter(optimizer.state.values()), {})
    return int(first.get("step", 0))


def set_updates(optimizer: torch.optim.Optimizer, count: int) -> None:
    for state in optimizer.state.values():
        step = state["step"]
        state["step"] = torch.full_like(step, count) if isinstance(step, Tensor) else count
