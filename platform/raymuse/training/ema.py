"""Exponential moving average of the weights, kept where the fp32 weights are, so that it is right at any ZeRO stage."""

from collections.abc import Iterator

import torch
from torch import Tensor

from raymuse.training.engine import Engine, full_weights, swapped


class Ema:
    """Average of the engine's shards: `average = decay average + (1 - decay) weights` after every step.

    Early on the decay is at most (1 + n) / (10 + n) after n updates, so that the start is forgotten.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine = engine
        self.decay = decay
        self.updates = 0
        self.average = [shard.clone() for shard in engine.shards()]

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.engine.shards(), 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """Every averaged parameter, full, fp32, on the CPU. Collective."""
        with swapped(self.engine, self.average):
            return full_weights(self.engine)

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Every averaged parameter by its name, full, fp32; to be gone through, and copied on the way. Collective."""
        with swapped(self.engine, self.average):
            yield from self.engine.each()

    def restore(self, weights: dict[str, Tensor], updates: int) -> None:
        """Set the average from full parameters; the engine's own weights are left as they were. Collective."""
        kept = [shard.clone() for shard in self.engine.shards()]
        for name, value in weights.items():
            self.engine.write(name, value)
        self.average = [shard.clone() for shard in self.engine.shards()]
        for shard, value in zip(self.engine.shards(), kept, strict=True):
            shard.copy_(value)
        self.updates = updates
