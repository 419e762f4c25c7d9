"""A transformer whose linears are laid out for oneDNN, which multiplies quicker on a CPU than what PyTorch calls."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raymuse.config.errors import UserError
from raymuse.models.uvit_blocks import PointwiseConv

N = TypeVar("N", bound=nn.Module)

_ONCE = ("encoder_proj", "text_proj")  # they run once a picture, and say the network's dtype


class PackedLinear(nn.Module):
    """A linear over the last axis, inference alone; the weight is in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1).contiguous(), rows)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack(network: N, rows: int) -> N:
    """A copy with packed linears, in fp32 on a CPU; it shares all other weights.

    Args:
        rows: that a linear mostly sees at once; decides the layout.

    Raises:
        UserError: for a network that is elsewhere, or a PyTorch without oneDNN.
    """
    weights = list(network.parameters())
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        raise UserError(
            "only a network in fp32 on the CPU can be packed: load it with device='cpu' and precision='fp32'."
        )
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise UserError(f"this PyTorch ({torch.__version__}) has no oneDNN: draw without packing.")
    packed = copy.deepcopy(network, {id(weight): weight for weight in weights})
    _replace(packed, rows)
    return packed


def is_packed(network: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in network.modules())


def _replace(module: nn.Module, rows: int) -> None:
    for name, child in module.named_children():
        if name in _ONCE:
            continue
        if isinstance(child, nn.Linear | PointwiseConv):
            setattr(module, name, PackedLinear(child.weight, child.bias, rows))
        else:
            _replace(child, rows)
