"""Signals that ask a training to stop: it then writes a checkpoint after the step that it is in, and ends."""

import signal
import socket
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

    def __init__(self, told: Callable[[], None]) -> None:
        self.by: int | None = None
        self._told = told
        self._handled = 0

    def __call__(self) -> bool:
        return self.by is not None

    def raised(self) -> BaseException:
        """What the signal would have raised without us."""
        return KeyboardInterrupt() if self.by == signal.SIGINT else SystemExit(143)

    def came(self, number: int) -> None:
        """In a thread, as the signal comes."""
        if self.by is None and number in SIGNALS:
            self.by = number
            self._told()

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """In the main thread, when Python gets to it."""
        self._handled += 1
        if self._handled > 1:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)


@contextmanager
def listening(told: Callable[[], None] = lambda: None) -> Iterator[Stopped]:
    """Inside, the first SIGTERM or Ctrl-C is kept for the training to see; `told` is called when it comes.

    Python hands signals to the main thread alone: elsewhere nothing is kept.
    """
    stopped = Stopped(told)
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    with woken(stopped.came):
        before = {number: signal.signal(number, stopped.handle) for number in SIGNALS}
        try:
            yield stopped
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def woken(told: Callable[[int], None]) -> Iterator[None]:
    """Inside, `told` is called in a thread with the number of every signal that has a handler, as it comes.

    Python would call the handler itself only once the main thread leaves the library that it waits in: Ray's come back
    every second, or when there is work. To be entered in the main thread.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def wait() -> None:
        while number := ours.recv(1)[0]:
            told(number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.send(b"\0")
        thread.join()
        ours.close()
        theirs.close()
