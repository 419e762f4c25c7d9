"""For tests that kill: find the processes that descend from this one, and wait for the moment."""

import contextlib
import time
from collections.abc import Callable, Iterable

import psutil

# `python -c PRETOKENIZE CONFIG_JSON`: the stage in a Ray of its own, which dies with the process.
PRETOKENIZE = """
import sys
from raymuse.clusters.local import session
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.stages.pretokenize import pretokenize
from raymuse.tracking.run import Run

with session(num_cpus=4, object_store_gib=0.1, dashboard=False):
    pretokenize(PretokenizeConfig.model_validate_json(sys.argv[1]), Run.off())
"""


def children_named(word: str) -> list[psutil.Process]:
    """Living descendants of this process (Ray's workers among them) with `word` in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if word in process.name() + " ".join(process.cmdline()):
                found.append(process)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended: a zombie has."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until(true: Callable[[], object], seconds: float) -> None:
    """Return as soon as `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.002)
