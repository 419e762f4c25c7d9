"""For tests that kill: find the processes that descend from this one, and wait for the moment."""

import contextlib
import time
from collections.abc import Callable

import psutil


def children_named(word: str) -> list[psutil.Process]:
    """Living descendants of this process (Ray's workers among them) with `word` in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in process.name() + " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(true: Callable[[], object], seconds: float) -> None:
    """Return as soon as `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)
