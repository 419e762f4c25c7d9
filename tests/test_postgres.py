"""MLflow with Postgres behind it, where Debian's is installed: several writers, both killed meanwhile, and browsing."""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from browser import CHROMIUM, Browser
from postgres import PROGRAMS, Mlflow, Postgres, postgres
from raymuse.doctor import examine

WRITERS, STEPS = 4, 300
EXPERIMENT = "behind postgres"

# Logs a step each ten milliseconds, and says when it has done a half.
WRITE = """
import pathlib, sys, time
from PIL import Image
from raymuse.tracking.run import finishing, open_run
uri, number, steps, spool = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
run = open_run(uri, "behind postgres", f"writer {number}", tags={"writer": number}, spool=spool)
run.params({"number": number, "optimizer": {"lr": 10.0 ** -number}})
for step in range(steps):
    run.metrics({"loss": number + 1 / (1 + step), "rate": step}, step)
    time.sleep(0.01)
    if step == steps // 2:
        print("half", flush=True)
run.picture("samples", Image.new("RGB", (64, 64), "red"), step=steps)
sys.exit(0 if run.finish(timeout=300) else "not all arrived")
"""

pytestmark = pytest.mark.skipif(
    not (PROGRAMS / "initdb").exists(), reason="Debian's Postgres is not installed (apt install postgresql)"
)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(scope="module")
def mlflow(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    server = Mlflow(tmp_path_factory.mktemp("mlflow"), database.uri)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def written(mlflow: Mlflow, database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The experiment's id, after writers that wrote at once, while server and data base were killed and came back."""
    spools = tmp_path_factory.mktemp("spools")
    writers = []
    for number in range(WRITERS):
        words = [mlflow.uri, str(number), str(STEPS), str(spools / str(number))]
        writers.append(subprocess.Popen([sys.executable, "-c", WRITE, *words], stdout=subprocess.PIPE, text=True))
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "half\n"
        mlflow.kill()
        database.crash()
        database.start()
        mlflow.start()
        assert [writer.wait(300) for writer in writers] == [0] * WRITERS
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [path for spool in spools.iterdir() for path in spool.iterdir()] == []  # nothing waits, nothing was refused
    return str(client(mlflow).get_experiment_by_name(EXPERIMENT).experiment_id)


def client(mlflow: Mlflow) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(mlflow.uri)


def test_every_number_of_every_writer_is_there_once(mlflow: Mlflow, written: str) -> None:
    runs = client(mlflow).search_runs([written])
    assert sorted(run.info.run_name for run in runs) == [f"writer {number}" for number in range(WRITERS)]
    for run in runs:
        number = int(run.data.tags["writer"])
        assert (run.info.status, run.data.params["number"]) == ("FINISHED", str(number))
        rows = client(mlflow).get_metric_history(run.info.run_id, "loss")
        assert [(row.step, row.value) for row in sorted(rows, key=lambda row: row.step)] == [
            (step, number + 1 / (1 + step)) for step in range(STEPS)
        ]
        assert len(client(mlflow).list_artifacts(run.info.run_id, "images")) == 2  # it, and its thumbnail


def test_runs_are_found_as_pages_ask_for_them(mlflow: Mlflow, written: str) -> None:
    """Filtered, ordered, a page at a time; and the curve of several runs in one answer."""
    found = client(mlflow).search_runs(
        [written], "metrics.loss > 1 and params.number != '3'", order_by=["metrics.loss"]
    )
    assert [run.data.params["number"] for run in found] == ["1", "2"]
    first = client(mlflow).search_runs([written], order_by=["tags.writer DESC"], max_results=3)
    rest = client(mlflow).search_runs([written], order_by=["tags.writer DESC"], max_results=3, page_token=first.token)
    assert [run.data.tags["writer"] for run in [*first, *rest]] == ["3", "2", "1", "0"]
    ids = "&".join(f"run_ids={run.info.run_id}" for run in found)
    curve = f"{mlflow.uri}/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval?{ids}&metric_key=loss&max_results=50"
    with urllib.request.urlopen(curve, timeout=60) as answer:
        points = json.load(answer)["metrics"]
    assert {point["run_id"] for point in points} == {run.info.run_id for run in found}
    assert {0, STEPS - 1} <= {int(point.get("step", 0)) for point in points}


@pytest.mark.skipif(shutil.which(CHROMIUM[0]) is None, reason="there is no Chromium")
def test_a_browser_shows_the_runs(mlflow: Mlflow, written: str, tmp_path: Path) -> None:
    with Browser(tmp_path) as page:
        page.open(f"{mlflow.uri}/#/experiments/{written}/runs?workflowType=machine_learning")
        for number in range(WRITERS):
            page.wait_for(f"document.body?.innerText.includes('writer {number}')", 300)


def test_the_doctor_knows_it_and_the_password_is_nowhere_to_be_read(
    mlflow: Mlflow, database: Postgres, written: str
) -> None:
    (found,) = [finding for finding in examine(None, mlflow.uri) if finding.name == "mlflow"]
    assert found.level == "ok"
    lines = [mlflow.log.read_text(), (database.folder / "log").read_text()]
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    assert [line for line in lines if database.password in line] == []
