"""Side-by-side timings: pairs of runs in turn, the ratio of each pair, a table and build/bench/NAME.json."""

import importlib.metadata
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


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
) -> Row:
    """Run the two in turn, `pairs` times, each returning its rate."""
    rates = []
    for number in range(pairs):
        pair = (ours(), peer()) if number % 2 == 0 else tuple(reversed((peer(), ours())))
        print(f"  {name} {number + 1}/{pairs}: ours {said(pair[0])}, {peer_name} {said(pair[1])} {unit}", flush=True)
        rates.append(pair)
    ratios = [one / other for one, other in rates]
    return Row(
        name,
        peer_name,
        statistics.median(one for one, _ in rates),
        statistics.median(other for _, other in rates),
        statistics.median(ratios),
        goal,
        (min(ratios), max(ratios)),
        unit,
        {package: importlib.metadata.version(package) for package in packages},
        hardware(),
    )


def write(name: str, rows: Sequence[Row]) -> None:
    """The rows to the terminal and to build/bench/NAME.json."""
    folder = Path("build/bench")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
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
