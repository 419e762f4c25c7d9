"""What is trained: a module whose forward pass is the loss, and the data that feeds it."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from raymuse.config.training import Precision
from raymuse.training.engine import Engine

Batch = dict[str, Tensor]

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What the matrix products of a training may be in, beside fp32."""


class Loss(nn.Module, ABC):
    """A loss as a module: `loss(batch) -> (loss, metrics)`, both *sums* over the batch's rows.

    A metric that is a mean over something else than the loss brings that sum as `NAME:of`. Its child `network` is what
    is trained, and kept under its own names; other children stay as they are, or are kept as adapters. With `precision`
    bf16 or fp16 the matrix products and convolutions of `sums` are in that; a subclass takes what the network made to
    fp32 before it computes the loss of it. Autocast is entered in here since DeepSpeed leaves one that it is called in.
    """

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast(next(iter(batch.values())).device.type):
            return self.sums(batch)

    def autocast(self, device_type: str, cache: bool = True) -> torch.autocast:
        """The number type of the matrix products; `cache` keeps a weight's copy in it for the next use."""
        low = LOW.get(self.precision)
        return torch.autocast(device_type, low or torch.bfloat16, enabled=low is not None, cache_enabled=cache)

    @abstractmethod
    def sums(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics."""


class Task(Protocol):
    """One of the trainings: its loss, whose `network` is trained, and the data that feeds it."""

    @property
    def module(self) -> Loss: ...

    def batch(self, positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        """The rows at these positions of the training stream; rows of weight 0 are padding."""

    def count(self, batch: Batch) -> float:
        """What the batch adds to the denominator of the global loss (rows, masked positions)."""

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        """Work between steps (codebook care), and metrics of it. Collective."""

    def skipped(self) -> None:
        """Forget what the step's passes left behind: it was not taken, and `after_step` is not called."""

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        """Which rows of the data stand at these positions of the training stream, for a person to look at."""

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors outside the parameters that a resume needs, the same on every rank."""

    def load_extra_state(self, state: dict[str, Tensor]) -> None: ...

    def sample(self, weights: dict[str, Tensor]) -> Image.Image | None:
        """A sheet of pictures of what the weights do; None where the config gives no means. On rank 0 alone."""

    def save(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write the trained model's folder; facts about it for the run. Called on rank 0 alone."""


class Stateless:
    """A task that has nothing to do between steps and nothing to keep but the weights."""

    def after_step(self, step: int, engine: Engine) -> dict[str, float]:
        return {}

    def skipped(self) -> None:
        """Nothing is left behind."""

    def extra_state(self) -> dict[str, Tensor]:
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """There is none."""


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
