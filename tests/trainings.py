"""A training as a worker runs it, in this process. It imports little, since every rank of a test imports it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raymuse.config.training import TrainConfig
from raymuse.storage.checkpoint import newest
from raymuse.tracking.run import Run
from raymuse.training.build import build_engine, build_task
from raymuse.training.loop import Loop
from raymuse.training.task import Task

Trained = tuple[list[float], dict[str, Tensor]]


@dataclass(frozen=True)
class Record(Run):
    """A run that is not tracked, and keeps the losses logged to it."""

    losses: list[float]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.losses.extend([values["loss"]] if "loss" in values else [])


def losses_of(
    config: TrainConfig,
    task: Task,
    report: Callable[[dict[str, float], Path | None], None] = lambda *_: None,
    device: str = "cpu",
) -> list[float]:
    """Train the task; the loss of every step that is logged."""
    run = Record(None, Path(), [])
    Loop(config, task, build_engine(config, task, device), run, report, lambda line: None).fit()
    return run.losses


def fit(config: TrainConfig) -> Trained:
    """The losses of a training on one thread, and all tensors of its last checkpoint."""
    torch.set_num_threads(1)
    losses = losses_of(config, build_task(config))
    found = newest(Path(config.output))
    assert found is not None
    return losses, found.tensors()


def fit_all(configs: list[TrainConfig]) -> list[Trained]:
    return [fit(config) for config in configs]
