"""How many steps a training takes: those of its config, or as many more as fit into its budget of minutes."""

import json
from collections.abc import Callable
from statistics import median

from raymuse.config.training import TIMED_STEPS, MaskedConfig, TrainConfig
from raymuse.storage.folder import Folder
from raymuse.training.engine import rank_and_world
from raymuse.training.saving import agreed

FILE = "length.json"
ROUND = 50
"""Lengths are multiples of it, so that a machine takes mostly the same."""


class Length:
    """The steps of one training, on one rank.

    With a budget `TIMED_STEPS` are timed, then it is decided, once, and written down: a training that goes on later is
    as long as it was to be. Until then the learning rate's schedule is the longest one's, so that it never rises.

    Args:
        say: rank 0's progress.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self.budget = config.stretch if isinstance(config, MaskedConfig) else None
        self.may_be_decided = isinstance(config, MaskedConfig) and config.budget is not None
        self.steps = config.steps
        self.horizon = config.steps if self.budget is None else self.budget.max_steps  # of the schedule
        self.folder = Folder(config.output)
        self.say = say
        self._seconds: list[float] = []

    def resume(self, horizon: int | None) -> None:
        """Be as long as was decided, where it was, though it might not be now. Collective.

        Args:
            horizon: of the checkpoint that the training goes on from: its config's steps where it was not to be longer.
        """
        if not self.may_be_decided:
            return
        decided = agreed(self._decided() if rank_and_world()[0] == 0 else None)
        self._be(self.steps if decided is None and horizon == self.steps else decided)

    def took(self, seconds: float, done: int) -> None:
        """A step took that long, and so many are done. Collective where it is the last that is timed."""
        if self.horizon == self.steps:  # it is decided, or there is nothing to decide
            return
        self._seconds.append(seconds)
        if len(self._seconds) == TIMED_STEPS or done == self.steps:
            self._be(agreed(self._decide() if rank_and_world()[0] == 0 else None))

    def _be(self, decided: int | None) -> None:
        if decided is not None:
            self.steps = self.horizon = decided

    def _decide(self) -> int:
        assert self.budget is not None
        step = median(self._seconds[len(self._seconds) // 4 :])
        fitting = int(60 * self.budget.minutes / step) // ROUND * ROUND
        steps = min(max(fitting, self.steps), self.budget.max_steps)
        self.folder.write(FILE, json.dumps({"steps": steps, "seconds_per_step": step}).encode())
        self.say(f"a step takes {step:.3f} s: {steps} steps ({self.steps} to {self.budget.max_steps})")
        return steps

    def _decided(self) -> int | None:
        return int(json.loads(self.folder.read(FILE))["steps"]) if self.folder.exists(FILE) else None
