"""What a picture costs, and what the hardware that draws it can do: how near the one is to the other."""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from raymuse.models.peak import measured_peak
from raymuse.pipeline import Pipeline


@dataclass(frozen=True)
class Limit:
    """Floating-point operations, a multiplication and an addition being two.

    Attributes:
        first: of a picture that takes one step without guidance: text, one pass, super-resolution, decoding.
        further: of every pass of the base beyond it; a step with guidance is two.
        peak: a second, that one replica's hardware can do.
    """

    first: float
    further: float
    peak: float

    def work(self, pictures: int, passes: int) -> float:
        """Operations of so many pictures whose base is asked so many times in all."""
        return pictures * self.first + (passes - pictures) * self.further


def measure(pipeline: Pipeline, drawers: int, peak: float | None = None) -> Limit:
    """Count the operations of two small drawings, and time a product of matrices as large as the hardware likes.

    Rows that pad a batch are not counted: they are work that no picture needs.

    Args:
        drawers: threads that draw at a time, each with one core, or with the GPU.
        peak: operations a second, where they are known; None: measured, in the number type of the drawing.
    """
    torch.set_num_threads(1)  # as in a drawer's thread
    alone = replace(pipeline, batch_size=1, cuda_graphs=False)  # a graph's operations are not seen
    first, second = (_operations(alone, steps) for steps in (1, 2))
    weight = next(pipeline.base.parameters())
    return Limit(first, second - first, drawers * measured_peak(weight.device, weight.dtype) if peak is None else peak)


def _operations(pipeline: Pipeline, steps: int) -> float:
    with FlopCounterMode(display=False) as counter:
        pipeline.draw([pipeline.request("a", 0, steps=steps, guidance=1.0)])
    return float(counter.get_total_flops())
