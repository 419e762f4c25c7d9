"""How much of its hardware a training uses: memory, and the share of what the processors could compute (MFU)."""

from dataclasses import dataclass

import psutil
import torch

from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.models.peak import measured_peak
from raymuse.training.engine import Engine

GIB = 2**30


@dataclass(frozen=True)
class Usage:
    """What the numbers are held against, on rank 0.

    Attributes:
        device: of this rank's parameters.
        flops: of a sample's passes, a multiply-add being two, without what gradient checkpointing repeats; None: nobody
            has counted them, and the share is not told.
        peak: operations a second that all ranks' hardware together can do.
    """

    device: torch.device
    flops: float | None = None
    peak: float = 1.0

    @classmethod
    def of(cls, config: TrainConfig, engine: Engine, told: bool) -> "Usage":
        """What a training starts with; with `told` False nobody looks, and nothing is measured."""
        device = next(engine.module.parameters()).device
        if engine.rank > 0 or not told or not isinstance(config, MaskedConfig):
            return cls(device)
        from raymuse.training.plan import plan_of  # which asks the loop how batches are cut

        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        return cls(device, plan_of(config).flops, engine.world * measured_peak(device, dtype))

    def numbers(self, samples_per_second: float) -> dict[str, float]:
        """Memory of this rank now, GiB (of a GPU: the most since the last call), and the model FLOPs utilization."""
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        share = {} if self.flops is None else {"mfu": samples_per_second * self.flops / self.peak}
        return {"memory_gib": memory / GIB, **share}
