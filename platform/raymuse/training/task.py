"""What is trained: a module whose forward pass is the loss, and the data that feeds it."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from raymuse.training.engine import Engine

Batch = dict[str, Tensor]


class Task(Protocol):
    """One of the four trainings.

    Attributes:
        module: the loss as a module: `module(batch) -> (loss, metrics)`, both *sums* over the batch's rows. Its child
            `network` is what is trained, so that every parameter's name starts with `network.`.
    """

    @property
    def module(self) -> nn.Module: ...

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        """The rows at these positions of the training stream; rows of weight 0 are padding."""

    def count(self, batch: Batch) -> float:
        """What the batch adds to the denominator of the global loss (rows, masked positions)."""

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        """Work between steps (codebook care), and metrics of it. Collective."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors outside the parameters that a resume needs, the same on every rank."""

    def load_extra_state(self, state: dict[str, Tensor]) -> None: ...

    def sample(self, weights: dict[str, Tensor]) -> Image.Image | None:
        """A sheet of pictures of what the weights do; None where the config gives no means. On rank 0 alone."""

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write the trained model's folder; facts about it for the run. Called on rank 0 alone."""


def network_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the network's own names."""
    return {name.removeprefix("network."): value for name, value in weights.items()}


def sheet(rows: list[NDArray[np.uint8]], scale: int = 2) -> Image.Image:
    """Pictures (N, H, W, 3), row under row, as one; enlarged without smoothing."""
    height = max(row.shape[1] for row in rows)
    bands = []
    for row in rows:
        times = height // row.shape[1]
        bands.append(np.concatenate(list(row.repeat(times, axis=1).repeat(times, axis=2)), axis=1))
    return Image.fromarray(np.concatenate(bands).repeat(scale, axis=0).repeat(scale, axis=1))
