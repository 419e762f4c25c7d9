"""Signals that ask a training to stop: it then writes a checkpoint after the step that it is in, and ends."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stopping = Callable[[], bool]
"""Whether this rank was asked to stop."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def never() -> bool:
    """Nobody asks."""
    return False


class Stopped:
    """The first SIGTERM or Ctrl-C of this process, kept; a second one ends it as it would have without this.

    Attributes:
        by: the signal that came; None before.
    """

    def __init__(self, told: Callable[[], None] | None = None) -> None:
        self.by: int | None = None
        self._told = told

    def __call__(self) -> bool:
        return self.by is not None

    def raised(self) -> BaseException:
        """What the signal would have raised without us."""
        return KeyboardInterrupt() if self.by == signal.SIGINT else SystemExit(143)

    def keep(self, number: int, _frame: FrameType | None) -> None:
        """The handler."""
        if self.by is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.by = number
        if self._told is not None:
            self._told()


@contextmanager
def listening(told: Callable[[], None] | None = None) -> Iterator[Stopped]:
    """Inside, the first SIGTERM or Ctrl-C is kept for the training to see; `told` is called when it comes.

    Python hands signals to the main thread alone: elsewhere nothing is kept.
    """
    stopped = Stopped(told)
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, stopped.keep) for number in SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
