"""For tests that kill: find the processes that descend from this one, and wait for the moment."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from raymuse.clusters.guard import marked
from raymuse.config.base import StageConfig

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


def kill_family(process: psutil.Process) -> None:
    """It and all that descends from it, at once and without notice."""
    family = [process, *process.children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=60)


def wait_until(true: Callable[[], object], seconds: float, pause: float = 0.002) -> None:
    """Return as soon as `true()` is, asked every `pause` seconds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(pause)


class Job:
    """One driver process with a Ray of its own.

    Args:
        program: `python -c PROGRAM CONFIG_JSON`.
        home: where its Ray keeps its files.
        work: in the titles of the workers that do its work.
        written: what of its output tells how far it is.
    """

    def __init__(
        self, program: str, config: StageConfig, home: Path, work: Sequence[str], written: Callable[[Path], object]
    ) -> None:
        self.home, self.output, self.work, self.written = home, Path(config.output), work, written
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, config.model_dump_json()],
            env=outside | {"TMPDIR": str(home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def works_for(self, seconds: float) -> bool:
        """Wait until something more is written, and then for a while; False where the job ended first."""
        before = self.written(self.output)
        wait_until(lambda: self.written(self.output) != before or self.process.poll() is not None, 300)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def some_worker(self, moments: random.Random) -> psutil.Process | None:
        """One of those that work now."""
        found = []
        for ray in self.home.glob("raymuse-*"):
            for process in marked(ray):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") and any(name in title for name in self.work):
                        found.append(process)
        return moments.choice(sorted(found, key=lambda process: process.pid)) if found else None

    def kill(self) -> None:
        """SIGKILL the driver, and wait until its Ray has gone after it."""
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not self._left(), 60)

    def wait(self) -> int:
        return self.process.wait(timeout=600)

    def _left(self) -> list[psutil.Process]:
        return alive(process for ray in self.home.glob("raymuse-*") for process in marked(ray))


def storm(begin: Callable[[], Job], moments: random.Random, most: int) -> list[str]:
    """Run a job to its end, killing drivers and workers at random moments on the way; what was killed."""
    killed: list[str] = []
    job = begin()
    while len(killed) < most:
        if not job.works_for(moments.uniform(0.0, 3.0)):
            break
        if moments.random() < 0.35:
            job.kill()
            killed.append("driver")
            job = begin()
        elif worker := job.some_worker(moments):
            worker.kill()
            killed.append("worker")
    assert job.wait() == 0
    return killed
