"""What a step takes of the hardware: memory, and the share of its arithmetic (MFU)."""

import re
import resource

import torch

from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.training.engine import global_sum, rank_and_world
from raymuse.training.measure import Sizes, work

PEAKS = {"H200": 790, "H100": 790, "A100": 250, "L40S": 290, "A10G": 56, "L4": 97, "T4": 52}
"""TFLOP/s of large products in bf16, by a word of a GPU's name: those of clusters/prices.yaml."""


def peak_tflops(config: TrainConfig) -> float | None:
    """What a worker's device can do; None: not known, as of a CPU or of fp32."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    if not config.use_gpu or config.precision == "fp32":
        return None
    return known_tflops(torch.cuda.get_device_name())


def known_tflops(name: str) -> float | None:
    """Of a GPU by its whole name, such as `NVIDIA A100-SXM4-80GB`; an L40 is no L4, and an RTX A1000 no A100."""
    words = re.split(r"[\s-]+", name)
    return next((peak for known, peak in PEAKS.items() if known in words), None)


def flops_of_step(config: TrainConfig, task: object) -> float | None:
    """Floating-point operations of a step of a masked training, without what gradient checkpointing repeats."""
    from raymuse.training.critic import CriticTask
    from raymuse.training.masked import MaskedTask

    if not isinstance(config, MaskedConfig) or not isinstance(task, MaskedTask | CriticTask):
        return None
    stream, shape = task.stream, task.network.config
    low = stream.store.grid("low_ids") if hasattr(shape, "low_grid") else (1, 1)
    sizes = Sizes(1, stream.grid, int(stream.empty_states.shape[1]), low=low)
    return work(config, shape, sizes) * config.batch_size


class Utilisation:
    """MFU and memory for the log.

    Args:
        config, task: what is trained; its work is counted once, on rank 0, where a device's peak is known.
    """

    def __init__(self, config: TrainConfig, task: object) -> None:
        rank, self.world = rank_and_world()
        peak = peak_tflops(config) if rank == 0 else None
        needed = flops_of_step(config, task) if peak is not None else None
        self.seconds = None if peak is None or needed is None else needed / (peak * 1e12 * self.world)
        self.device = torch.cuda.current_device() if config.use_gpu else None

    def of(self, seconds_per_step: float) -> dict[str, float]:
        """`memory_gib`, of the fullest worker since the start, and `mfu` on rank 0 where it is known. Collective."""
        values = {"memory_gib": self._fullest() / 2**30}
        if self.seconds is not None:
            values["mfu"] = self.seconds / max(seconds_per_step, 1e-9)
        return values

    def _fullest(self) -> float:
        """Bytes: of the GPU's tensors, or of the process where it computes on a CPU. Collective."""
        rank, world = rank_and_world()
        if self.device is not None:
            mine = float(torch.cuda.max_memory_allocated(self.device))
        else:
            mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        every = torch.zeros(world, dtype=torch.float64)
        every[rank] = mine
        return float(global_sum(every).max())
