"""Sums of gradients that have no order: a step's weights have the same bits however many workers share it.

Floating-point additions round, so a sum depends on their order, and the order on who adds what; training then magnifies
the rounding. Here the gradients of the same few rows are computed together whatever the number of workers, rounded to
multiples of 2^-44, and added as 64-bit integers.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

UNIT = 2.0**-44
"""What a gradient of the mean loss is rounded to: four digits remain of one of 1e-9, a tenth of AdamW's epsilon."""
LARGEST = 2.0**18
"""That a sum may be; its integer is half of what 64 bits hold."""


class ExactSums:
    """The gradients of a step, summed over micro batches and ranks.

    Args:
        parameters: all that are trained, in the same order on every rank.
        pieces: micro batches of a step, over all ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], pieces: int) -> None:
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.bound = LARGEST / pieces
        # Last: how many gradients were no numbers, or so large that their sum might not fit.
        self.sums = torch.zeros(sum(self.sizes) + 1, dtype=torch.int64, device=self.parameters[0].device)

    def backward(self, loss: Tensor, scale: float = 1.0) -> None:
        """Add a micro batch's gradients, without `scale`, a factor on the loss that is a power of two."""
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)
        *places, lost = torch.split(self.sums, [*self.sizes, 1])
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is None:
                continue
            lost += ~(gradient.abs().amax() <= self.bound * scale)
            place += (gradient.flatten() * (1 / (UNIT * scale))).round_().to(torch.int64)

    def take(self, clip_norm: float | None) -> tuple[list[Tensor], Tensor]:
        """(the step's fp32 gradients, clipped; their norm before), and begin the next step. Collective.

        The norm is not a number where a gradient was none, on every rank.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.sums)
        *places, lost = torch.split(self.sums, [*self.sizes, 1])
        gradients = [
            (place.double() * UNIT).float().view_as(parameter)
            for place, parameter in zip(places, self.parameters, strict=True)
        ]
        norm = nn.utils.get_total_norm(gradients) if not lost else torch.tensor(torch.nan)
        self.sums.zero_()
        if clip_norm is not None and norm > clip_norm:
            torch._foreach_mul_(gradients, clip_norm / norm)
        return gradients, norm
