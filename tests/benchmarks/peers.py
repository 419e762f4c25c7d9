"""Peers in environments of their own, and processes that are measured in turn on one machine.

`make bench-peers` builds build/peers/NAME; nothing of a peer enters the project's own environment.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from report import PROCESSOR

ROOT = Path("build/peers")
READY = 600  # seconds until a process has its first line


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment.

    Raises:
        SystemExit: where it was not made yet.
    """
    python = ROOT / peer / "bin" / "python"
    if not python.exists():
        sys.exit(f"{ROOT / peer} does not exist: run `make bench-peers` first.")
    return str(python.absolute())


def versions_of(peer: str, packages: Sequence[str]) -> dict[str, str]:
    """What is installed in a peer's environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    told = subprocess.run([python_of(peer), "-c", code, *packages], check=True, capture_output=True, text=True)
    return {f"{peer}'s {name}": version for name, version in json.loads(told.stdout).items()}


def environment(threads: int, peer: bool = True) -> dict[str, str]:
    """Of a process that counts on so many cores; a peer's without what belongs to our own environment."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV") if peer else ()
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Step:
    """A line of a training: when it was seen (by the benchmark's clock), its step and its loss."""

    seconds: float
    step: int
    loss: float


@dataclass
class Training:
    """A training in a process of its own, which goes on only in its turns: between them it is suspended.

    Start-up then costs nobody a turn, and the turns of two lie seconds apart, so that a slow minute of the machine
    slows both.

    Args:
        pattern: of a line that tells of a step: groups `step` and `loss`.
        worker: part of the name of the process that is suspended; "": the one that was started, and all below it.
    """

    process: psutil.Popen
    log: Path
    pattern: re.Pattern[str]
    worker: str = ""
    lines: list[Step] = field(default_factory=list)
    _read: int = 0

    def turn(self, steps: int, patience: float = READY) -> float:
        """Seconds a step: so many whole ones after the first line, which may have begun before the turn."""
        self._follow()  # what came just before it was suspended belongs to no turn
        before = len(self.lines)
        self._each(psutil.Process.resume)
        try:
            deadline = time.monotonic() + patience
            while len(self.lines) < before + 1 + steps:
                self._follow()
                if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
                    raise RuntimeError(f"a training ended early; its last words:\n{self.log.read_text()[-3000:]}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no step in {patience:.0f} s; last words:\n{self.log.read_text()[-3000:]}")
                time.sleep(0.005)
            first, last = self.lines[before], self.lines[-1]
            return (last.seconds - first.seconds) / (last.step - first.step)
        finally:
            self._each(psutil.Process.suspend)

    def losses(self) -> dict[int, float]:
        return {line.step: line.loss for line in self.lines}

    def end(self) -> None:
        """Ask it to stop, which ours answers with a checkpoint; what is left after two minutes is killed."""
        self._each(psutil.Process.resume)
        self.log.unlink(missing_ok=True)
        with suppress(psutil.NoSuchProcess):
            tree = [self.process, *self.process.children(recursive=True)]
            self.process.terminate()
            for process in psutil.wait_procs(tree, timeout=120)[1]:
                process.kill()

    def _follow(self) -> None:
        now = self._clock()
        with self.log.open() as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self._read += len(whole.encode())
        found = self.pattern.finditer(whole)
        self.lines += [Step(now, int(match["step"]), float(match["loss"])) for match in found]

    def _clock(self) -> float:
        """Seconds, or processor seconds of what is suspended between turns."""
        if not PROCESSOR:
            return time.perf_counter()
        spent: list[float] = []
        self._each(lambda process: spent.append(sum(process.cpu_times()[:2])))
        return sum(spent)

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        tree = [self.process, *self.process.children(recursive=True)]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                if not self.worker or self.worker in " ".join(process.cmdline()):
                    act(process)


def start(command: Sequence[str], pattern: str, *, threads: int, worker: str = "", peer: bool = False) -> Training:
    """Start a training whose output goes to a file."""
    log = Path(tempfile.mkstemp(prefix="bench-", suffix=".log")[1])
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment(threads, peer))
    return Training(process, log, re.compile(pattern), worker)
