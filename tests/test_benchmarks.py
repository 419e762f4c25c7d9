"""What the benchmarks write: rows of one schema, ratios of pairs, and a line through growing work."""

import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
KEYS = ["name", "peer_name", "ours", "peer", "ratio", "goal", "spread", "unit", "versions", "hardware"]


TRAINING = """
import itertools, time

for step in itertools.count(1):
    time.sleep(0.02)
    print(f"step {step} loss {1 / step:.4f}", flush=True)
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmarks, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return imported


@pytest.fixture
def report(modules: Callable[[str], ModuleType]) -> ModuleType:
    return modules("report")


def test_a_row_is_the_median_of_pairs_run_in_turn(report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    rates = {"ours": itertools.cycle([4.0, 6.0, 8.0]), "bare-pytorch": itertools.cycle([2.0, 2.0, 16.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(rates[name])

    row = report.compare(
        *("a loop", "bare-pytorch", lambda: run("ours"), lambda: run("bare-pytorch")),
        goal=1.5,
        unit="steps/s",
        packages=["numpy"],
        pairs=3,
        peer_versions={"theirs": "1.0"},
    )
    assert order == ["ours", "bare-pytorch", "bare-pytorch", "ours", "ours", "bare-pytorch"]
    assert (row.ours, row.peer, row.ratio, row.spread, row.goal) == (6.0, 2.0, 2.0, (0.5, 3.0), 1.5)
    assert set(row.versions) == {"numpy", "theirs"}
    assert "a loop 3/3: ours 8, bare-pytorch 16.0 steps/s" in capsys.readouterr().out


def test_files_have_the_schema_and_keep_the_rows_that_were_not_run(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rates = {"ours": [2.0], "limit": [4.0]}
    first, second = (report.row_of(name, "limit", rates, 0.5, "pictures/s", ["numpy"]) for name in ("one", "two"))
    report.write("some", [first, second])
    report.write("some", [first], keep=True)
    rows = json.loads((tmp_path / "build/bench/some.json").read_text())
    assert [row["name"] for row in rows] == ["two", "one"]
    assert all(list(row) == KEYS for row in rows)
    report.write("some", [first])
    assert len(json.loads((tmp_path / "build/bench/some.json").read_text())) == 1
    assert "| one | limit | 2 | 4 | pictures/s | 0.50 (0.50 to 0.50) | 0.50 |" in capsys.readouterr().out


def test_a_line_through_growing_work_has_its_fixed_cost_and_slope(report: ModuleType) -> None:
    fixed, each, _ = report.line({work: 3.0 + 0.5 * work for work in (1, 2, 4, 8, 16, 32)})
    assert (fixed, each) == (pytest.approx(3.0), pytest.approx(0.5))
    assert report.line({work: 2.0 * work for work in (1, 2, 4, 8)})[2] == pytest.approx(1.0)
    assert report.line({work: 2.0 * work**2 for work in (4, 8, 16)})[2] == pytest.approx(2.0)


def test_trainings_go_on_in_their_turns_alone(modules: Callable[[str], ModuleType]) -> None:
    training = modules("peers").start(
        [sys.executable, "-c", TRAINING], r"(?m)^step (?P<step>\d+) loss (?P<loss>[\d.]+)", threads=1
    )
    try:
        assert training.turn(5) > 0
        training._follow()
        steps = len(training.losses())
        time.sleep(0.5)
        training._follow()
        assert len(training.losses()) == steps
        training.turn(3)
        assert len(training.losses()) >= steps + 4
        losses = training.losses()
        assert losses == {step: pytest.approx(1 / step, abs=1e-4) for step in range(1, len(losses) + 1)}
    finally:
        training.end()
    assert not training.process.is_running()


def test_what_a_training_that_ends_early_said_is_told(modules: Callable[[str], ModuleType]) -> None:
    training = modules("peers").start([sys.executable, "-c", "raise SystemExit('no room')"], "step", threads=1)
    with pytest.raises(RuntimeError, match=r"ended early[^\n]*\n.*no room"):
        training.turn(1)
    training.end()


def test_a_peer_that_is_not_installed_is_named(
    modules: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="build/peers/amused does not exist: run `make bench-peers` first"):
        modules("peers").python_of("amused")
