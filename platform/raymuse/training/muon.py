"""Muon: the momentum of every hidden matrix made orthogonal; AdamW for all other parameters; sharded or whole.

Jordan et al., https://kellerjordan.github.io/posts/muon/; weight decay as Liu et al., arXiv 2502.16982, section 2.2.
It is ours because `torch.optim.Muon` takes whole 2-D parameters only, and DeepSpeed's compiles kernels when imported,
clips after it has orthogonalised, and cannot go on from our checkpoints.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

Layout = Callable[[Tensor, Tensor], Tensor]
"""(a parameter as the optimizer holds it, its update) -> that update with every matrix in it `orthogonalised`."""


def orthogonalised(update: Tensor) -> Tensor:
    """U V^T for an update U S V^T (rows, ...), nearly: five quintic Newton-Schulz iterations, S to about 0.7 to 1.2.

    A kernel counts as the matrix (rows, all the rest). Scaled by max(1, rows / columns) ** 0.5, so that what a layer
    puts out moves alike whatever its shape. In bf16 on a GPU, where the iterations bear it, else in fp32.
    """
    matrix = update.flatten(1)
    rows, columns = matrix.shape
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    x = (x if rows <= columns else x.T).to(torch.bfloat16 if x.is_cuda else x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    made = (x if rows <= columns else x.T).to(update.dtype).reshape(update.shape)
    return made * math.sqrt(max(1.0, rows / columns))


def whole(parameter: Tensor, update: Tensor) -> Tensor:
    """The layout of parameters that every rank holds whole."""
    return orthogonalised(update)


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in the ranks' shards put one after another: [start, stop) of its numbers, in their order."""

    shape: torch.Size
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shards:
    """The layout of flat parameters of which each rank holds a shard, all of one length.

    One collective a flat parameter; a rank orthogonalises the matrices of which it holds a part. Where ZeRO cuts
    between matrices (stages 1 and 2) the ranks share that work; where it cuts every matrix (stage 3) each does all.
    Needs the fp32 update of a whole flat parameter for a moment.
    """

    rank: int
    world: int
    places: Mapping[Tensor, Sequence[Place]]

    def __call__(self, parameter: Tensor, update: Tensor) -> Tensor:
        size = len(update)
        first, last = self.rank * size, (self.rank + 1) * size
        gathered = update.new_empty(self.world * size)
        dist.all_gather_into_tensor(gathered, update)
        for place in self.places[parameter]:
            if any(start < last and first < stop for start, stop in place.runs):
                pieces = [gathered[start:stop] for start, stop in place.runs]
                matrix = orthogonalised(torch.cat(pieces).view(place.shape)).flatten()
                for piece, part in zip(pieces, torch.split(matrix, [len(piece) for piece in pieces]), strict=True):
                    piece.copy_(part)
        return gathered[first:last]


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, and a given AdamW for its own parameters, as one optimizer with one list of groups.

    The momentum is elementwise and lies beside its parameter, sharded as that is. `layout` says how parameters are
    laid out; who shards them sets it. Gradients come in raw, so that they can be clipped before.

    Args:
        matrices: parameters of two or more dimensions.
        adamw: the optimizer of the others; its groups and state become this one's.
        weight_decay: decoupled: a step takes `lr weight_decay` of each weight.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        group = {"params": matrices, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([group, *adamw.param_groups], {})
        self.adamw = adamw
        self.layout: Layout = whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective where parameters are sharded."""
        for group in self.param_groups:
            if is_muon(group):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        # DeepSpeed narrows `param_groups` for a step: what stands in it now is to be updated.
        self.adamw.param_groups = [group for group in self.param_groups if not is_muon(group)]
        self.adamw.state = self.state
        self.adamw.step()

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """Nesterov momentum, made orthogonal by the layout, and weight decay."""
        state = self.state[parameter]
        if not state:
            state.update(step=torch.tensor(0.0), momentum_buffer=torch.zeros_like(parameter))
        state["step"] += 1
        momentum: Tensor = state["momentum_buffer"]
        assert parameter.grad is not None
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(momentum, group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(self.layout(parameter, nesterov), alpha=-group["lr"])


def is_muon(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group is updated by Muon; AdamW's groups have `betas`."""
    return "momentum" in group
