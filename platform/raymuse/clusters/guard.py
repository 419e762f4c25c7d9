"""Ends a private Ray whose driver was killed: `python -P guard.py DRIVER FOLDER`, started by local.py.

Ray's own agents outlive a killed driver by minutes, and nobody else removes its folder. The guard looks at the
driver's descendants twice a second while it lives, since Ray's agents and workers lose the mark when they retitle
themselves, and lose their parents when these die.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

MARK = "RAYMUSE_LOCAL_CLUSTER"  # in the environment of every process of a private cluster: its folder
POLL_SECONDS = 0.5
TRIES = 20  # at ending what is still being started


def marked(folder: str | Path) -> set[psutil.Process]:
    """The living processes that carry the folder's mark, and their descendants."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        if _is_marked(process, str(folder)):
            found |= {process, *_descendants(process)}
    return found


def _is_marked(process: psutil.Process, folder: str) -> bool:
    try:
        return bool(process.environ().get(MARK) == folder)
    except (psutil.Error, OSError):
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def watch(driver: int, folder: str) -> set[psutil.Process]:
    """Waits for the driver to go; returns every process of its Ray that was seen until then."""
    process = psutil.Process(driver)
    family: set[psutil.Process] = set()
    while os.getppid() == driver:
        for child in _descendants(process):
            if child not in family and (_is_marked(child, folder) or not family.isdisjoint(_ancestors(child))):
                family.add(child)
        time.sleep(POLL_SECONDS)
    return family


def _ancestors(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.parents())
    except psutil.Error:
        return []


def end(family: set[psutil.Process], folder: str) -> None:
    """Kills them all, and what they started meanwhile."""
    for _ in range(TRIES):
        family |= marked(folder) | {child for process in family for child in _descendants(process)}
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, family = map(set, psutil.wait_procs(family, timeout=1))
        if not family and not marked(folder):
            return


def main() -> None:
    """Watches, ends, removes the folder."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, which ends this process itself
    driver, folder = int(sys.argv[1]), sys.argv[2]
    end(watch(driver, folder), folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
