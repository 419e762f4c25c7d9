"""How far a batch job is: pictures a second, what is left, failures, and the share of the hardware that is used."""

import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from raymuse.serving.limit import Limit
from raymuse.tracking.run import Run


@dataclass(frozen=True)
class Done:
    """What one part came to.

    Attributes:
        pictures, failed: how many.
        passes: of the base's network, over all pictures.
    """

    pictures: int
    failed: int
    passes: int


class Progress:
    """Tells a terminal and MLflow, once a part.

    Args:
        total: pictures that are still to be drawn.
        replicas: that draw at a time.
        limit: what a picture costs and a replica can do; None: the share is not told.
        price: of an hour of all machines; 0: the cost is not told.
    """

    def __init__(self, total: int, replicas: int, limit: Limit | None, run: Run, price: float = 0.0) -> None:
        self.left, self.replicas, self.limit, self.run, self.price = total, replicas, limit, run, price
        self.drawn = self.failed = 0
        self._operations = 0.0
        self._began = time.perf_counter()

    def add(self, done: Done, parts: int) -> None:
        """One part more; `parts` are recorded by now."""
        self.drawn += done.pictures
        self.failed += done.failed
        self.left -= done.pictures + done.failed
        if self.limit is not None:
            self._operations += self.limit.work(done.pictures, done.passes)
        self.run.metrics(self.numbers(), parts)
        self._say(self.line())

    def numbers(self) -> dict[str, float]:
        """What MLflow is told."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = (self.drawn + self.failed) / seconds
        told = {
            "pictures": self.drawn,
            "failed": self.failed,
            "pictures_per_second": self.drawn / seconds,
            "queue": self.left,
            "seconds_left": self.left / max(rate, 1e-9),
        }
        if self.price:
            told["cost"] = self.price * seconds / 3600
        if self.limit is not None:
            told["share_of_limit"] = self._operations / seconds / (self.limit.peak * self.replicas)
        return told

    def line(self) -> str:
        """What people are told."""
        told = self.numbers()
        share = f"  {told['share_of_limit']:.1%} of the hardware's limit" if self.limit is not None else ""
        cost = f"  cost {told['cost']:,.2f}" if self.price else ""
        left = timedelta(seconds=round(told["seconds_left"]))
        return (
            f"{self.drawn:,} pictures  {self.failed:,} failed  {told['pictures_per_second']:.1f} pictures/s{share}"
            f"{cost}  {self.left:,} left, {left}"
        )

    def _say(self, line: str) -> None:
        """In place on a terminal, a line each elsewhere."""
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line}", end="" if self.left else "\n", flush=True)
        else:
            print(line, flush=True)
