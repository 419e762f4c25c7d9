"""A trace of a few steps, for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from raymuse.config.training import TrainConfig

WAIT, WARM, TRACED = 1, 1, 3
"""Steps passed over, steps in which the profiler itself warms up, and steps that are traced."""


@contextmanager
def tracing(config: TrainConfig, rank: int) -> Iterator[Callable[[], None]]:
    """Inside, the function given is to be called after every step.

    Where the config wants it, `output/profile/rank-00000.json` is written after TRACED steps, one file a rank.
    """
    if not config.profile:
        yield lambda: None
        return
    folder = Path(config.output) / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARM, active=TRACED, repeat=1),
        on_trace_ready=lambda made: made.export_chrome_trace(str(folder / f"rank-{rank:05d}.json")),
    ) as profiler:
        yield profiler.step
