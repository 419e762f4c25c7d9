"""The factor on the loss of an fp16 training, without which small gradients would be none."""

from raymuse.config.training import Precision

START, LEAST, WINDOW = 2.0**16, 1.0, 2000


class LossScale:
    """Halved after a step whose gradients were too large for fp16, doubled after `WINDOW` steps without one.

    Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2. A power of two, so that it changes
    no bit of what fp16 can hold. In other number types it is 1 and stays so.
    """

    def __init__(self, precision: Precision) -> None:
        self.scales = precision == "fp16"
        self.value, self.since = START if self.scales else 1.0, 0

    def fitted(self) -> None:
        """A step was taken."""
        self.since += 1
        if self.scales and self.since >= WINDOW:
            self.value, self.since = self.value * 2, 0

    def lowered(self) -> bool:
        """Whether it could be halved, after a step whose gradients were not finite though its loss was."""
        if self.value <= LEAST or not self.scales:
            return False
        self.value, self.since = self.value / 2, 0
        return True

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.value, float(self.since)]

    def load(self, state: list[float] | None) -> None:
        """From a checkpoint; None: of a training that had none."""
        if state is not None and self.scales:
            self.value, self.since = state[0], int(state[1])
