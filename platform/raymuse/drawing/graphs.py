"""A sampling step as a CUDA graph: its hundreds of kernels are started by one call.

As PyTorch's notes on CUDA graphs have it (docs.pytorch.org, "CUDA semantics"): some runs on a side stream, so that
libraries are set up and memory is laid out; a capture, which runs nothing; then replays, which read and write the same
memory. Whatever a step reads and writes must therefore stay where it is.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from raymuse.config.errors import UserError

WARM_UPS = 3


class StepGraphs:
    """A step that is captured once for every kind of it.

    Args:
        run: one step of a kind: of the same shapes always, waiting for nothing, in place.
        state: what a step changes, so that the runs before a capture leave no trace.
    """

    def __init__(self, run: Callable[[Hashable], None], state: Callable[[], Sequence[Tensor]]) -> None:
        self.run, self.state = run, state
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __call__(self, kind: Hashable) -> None:
        """One step."""
        if kind not in self._graphs:
            self._graphs[kind] = self._captured(kind)
        self._graphs[kind].replay()

    def forget(self) -> None:
        """What a step reads has moved."""
        self._graphs.clear()

    def _captured(self, kind: Hashable) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self.state()]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.run(kind)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(self.state(), before, strict=True):
            tensor.copy_(value)
        # One memory for all: they never run at a time, and nothing that one leaves there is another's.
        pool = next((known.pool() for known in self._graphs.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may draw, too
            self.run(kind)
        return graph


def require_graphs(device: str) -> None:
    """Raise UserError where there are no CUDA graphs."""
    if not device.startswith("cuda"):
        raise UserError(f"cuda_graphs needs a GPU of NVIDIA's, and the model is on {device}: draw without.")
    if not torch.cuda.is_available():
        raise UserError("cuda_graphs needs a GPU of NVIDIA's, and PyTorch finds none: draw without.")
