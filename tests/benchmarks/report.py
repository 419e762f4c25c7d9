"""Side-by-side timings: pairs of runs in turn, the ratio of each pair, a table and build/bench/NAME.json.

Where the machine does other work at the time, BENCH_CLOCK=processor has generate and train count processor seconds of
one thread a contender instead of seconds: what other work takes then counts for nobody. Their units say so.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

PROCESSOR = os.environ.get("BENCH_CLOCK") == "processor"
THREADS = 1 if PROCESSOR else 2
OF_WHAT = " of a core" if PROCESSOR else ""


def clock() -> float:
    """Seconds, or this process's processor seconds."""
    return time.process_time() if PROCESSOR else time.perf_counter()


@dataclass(frozen=True)
class Row:
    """One comparison; `ratio` above 1 means that we are better.

    Args:
        name: what was compared.
        peer_name: with whom.
        ours: median of our rates, in `unit`.
        peer: median of the peer's rates.
        ratio: median of the ratios of the pairs.
        goal: the ratio that was aimed at.
        spread: lowest and highest ratio of a pair.
    """

    name: str
    peer_name: str
    ours: float
    peer: float
    ratio: float
    goal: float
    spread: tuple[float, float]
    unit: str
    versions: dict[str, str]
    hardware: str


def paired(
    name: str, contenders: Mapping[str, Callable[[], float]], unit: str, pairs: int = 5
) -> dict[str, list[float]]:
    """Rates of contenders that are run in turn, `pairs` times each, every other time in the opposite order."""
    rates: dict[str, list[float]] = {contender: [] for contender in contenders}
    for number in range(pairs):
        for contender in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            rates[contender].append(contenders[contender]())
        told = ", ".join(f"{contender} {said(rates[contender][-1])}" for contender in contenders)
        print(f"  {name} {number + 1}/{pairs}: {told} {unit}", flush=True)
    return rates


def row_of(
    name: str,
    peer_name: str,
    rates: Mapping[str, Sequence[float]],
    goal: float,
    unit: str,
    packages: Sequence[str],
    peer_versions: Mapping[str, str] | None = None,
) -> Row:
    """The row of `ours` and one peer out of paired rates.

    Args:
        packages: whose versions here count.
        peer_versions: of an environment of the peer's own.
    """
    ours, peer = rates["ours"], rates[peer_name]
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    return Row(
        name,
        peer_name,
        statistics.median(ours),
        statistics.median(peer),
        statistics.median(ratios),
        goal,
        (min(ratios), max(ratios)),
        unit,
        {package: importlib.metadata.version(package) for package in packages} | dict(peer_versions or {}),
        hardware(),
    )


def compare(
    name: str,
    peer_name: str,
    ours: Callable[[], float],
    peer: Callable[[], float],
    *,
    goal: float,
    unit: str,
    packages: Sequence[str],
    pairs: int = 5,
    peer_versions: Mapping[str, str] | None = None,
) -> Row:
    """Run the two in turn, `pairs` times, each returning its rate."""
    rates = paired(name, {"ours": ours, peer_name: peer}, unit, pairs)
    return row_of(name, peer_name, rates, goal, unit, packages, peer_versions)


def line(seconds: Mapping[int, float]) -> tuple[float, float, float]:
    """(fixed seconds, seconds a unit, slope of the logarithms from 4 units on) by least squares of relative errors."""
    work, took = np.array(list(seconds), float), np.array(list(seconds.values()))
    fixed, each = np.linalg.lstsq(np.stack([1 / took, work / took], axis=1), np.ones_like(took), rcond=None)[0]
    large = work >= 4
    slope = np.polyfit(np.log(work[large]), np.log(took[large]), 1)[0]
    return float(fixed), float(each), float(slope)


def write(name: str, rows: Sequence[Row], keep: bool = False) -> None:
    """The rows to the terminal and to build/bench/NAME.json.

    Args:
        keep: the rows of other names that the file holds already, since these are but some.
    """
    path = Path("build/bench") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = [asdict(row) for row in rows]
    named = {(row.name, row.peer_name) for row in rows}
    old = json.loads(path.read_text()) if keep and path.exists() else []
    kept = [row for row in old if (row["name"], row["peer_name"]) not in named]
    path.write_text(json.dumps([*kept, *new], indent=1) + "\n")
    print(f"| {name} | peer | ours | peer's | unit | ratio (lowest to highest) | goal |\n|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row.spread
        print(
            f"| {row.name} | {row.peer_name} | {said(row.ours)} | {said(row.peer)} | {row.unit} "
            f"| {row.ratio:.2f} ({low:.2f} to {high:.2f}) | {row.goal:.2f} |"
        )


def said(rate: float) -> str:
    """Three digits at least."""
    return f"{rate:,.1f}" if rate >= 10 else f"{rate:.3g}"


def hardware() -> str:
    """The processor, its cores and the memory."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"{model}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
