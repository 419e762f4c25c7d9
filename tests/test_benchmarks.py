"""What the benchmarks write: rows of one schema, ratios of pairs, and a line through growing work."""

import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
KEYS = ["name", "peer_name", "ours", "peer", "ratio", "goal", "spread", "unit", "versions", "hardware"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "report", raising=False)
    return importlib.import_module("report")


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
