"""How many steps a training takes: those of its config, or as many more as fit into its budget of minutes."""

import json
from collections.abc import Callable
from statistics import median

import torch

from raymuse.config.errors import UserError
from raymuse.config.training import TIMED_STEPS, MaskedConfig, TrainConfig
from raymuse.storage.folder import Folder
from raymuse.training.engine import global_sum, rank_and_world

FILE = "length.json"
ROUND = 50
"""Lengths are multiples of it, so that a machine takes mostly the same."""


class Length:
    """The steps of one training, on one rank.

    The first `TIMED_STEPS` are of a training of `config.steps`; then it is decided, once, and written down: a training
    that goes on later is as long as it was to be.

    Args:
        say: rank 0's progress.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self.budget = config.stretch if isinstance(config, MaskedConfig) else None
        self.fewest = self.steps = config.steps
        self.folder = Folder(config.output)
        self.say = say
        self._seconds: list[float] = []

    def resume(self, done: int) -> None:
        """The training goes on after so many steps.

        Raises:
            UserError: it was decided how long it is, and what was written down is gone.
        """
        if self.budget is None or done < TIMED_STEPS:
            return
        if (decided := self._decided()) is None:
            raise UserError(
                f"{self.folder.address}/{FILE} is missing: it says how many steps this training takes, of which {done} "
                'are done. Write it anew, as {"steps": N}, or train into another output.'
            )
        self.steps = decided

    def took(self, seconds: float, done: int) -> None:
        """A step took that long, and so many are done. Collective where they are `TIMED_STEPS`."""
        if self.budget is None or done > TIMED_STEPS:
            return
        self._seconds.append(seconds)
        if done == TIMED_STEPS:
            mine = float(self._decide()) if rank_and_world()[0] == 0 else 0.0
            self.steps = int(global_sum(torch.tensor([mine], dtype=torch.float64)))

    def _decide(self) -> int:
        assert self.budget is not None
        if (known := self._decided()) is not None:
            return known
        step = median(self._seconds[len(self._seconds) // 4 :])
        fitting = int(60 * self.budget.minutes / step) // ROUND * ROUND
        steps = min(max(fitting, self.fewest), self.budget.max_steps)
        self.folder.write(FILE, json.dumps({"steps": steps, "seconds_per_step": step}).encode())
        self.say(f"a step takes {step:.3f} s: {steps} steps ({self.fewest} to {self.budget.max_steps})")
        return steps

    def _decided(self) -> int | None:
        return int(json.loads(self.folder.read(FILE))["steps"]) if self.folder.exists(FILE) else None
