"""How many pictures of a model may be on their way; what is more is sent away at once."""

import contextlib
import math
from collections.abc import Iterator

from raymuse.serving.protocol import Refused
from raymuse.serving.watch import metrics


class Room:
    """Counts the pictures of one model that are asked for and not done.

    Args:
        most: of them at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.on_their_way = 0
        self.took = 1.0
        """Seconds that the last requests took, on a moving average."""

    @contextlib.contextmanager
    def admitted(self, pictures: int) -> Iterator[None]:
        """Inside, so many pictures more are on their way.

        Raises:
            Refused: where that is more than may be.
        """
        self.require(pictures)
        self.on_their_way += pictures
        metrics().in_flight.inc(pictures)
        try:
            yield
        finally:
            self.on_their_way -= pictures
            metrics().in_flight.dec(pictures)

    def require(self, pictures: int) -> None:
        """Raise Refused where there is no room for so many."""
        if pictures > self.most:
            raise Refused(400, f"n: this server draws {self.most} pictures at a time, not {pictures}", param="n")
        if self.on_their_way + pictures > self.most:
            raise Refused(
                429,
                f"{self.on_their_way} pictures are on their way and {self.most} may be: try again",
                "rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=max(1, math.ceil(self.took)),
            )

    def note(self, seconds: float) -> None:
        """A request took so long: what those that are sent away are told to wait."""
        self.took += 0.2 * (seconds - self.took)
