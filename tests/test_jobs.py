"""The scripts in jobs/ under `ray job submit`, and `raymuse submit`, on a head of our own that asks for a token."""

import os
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.job_submission import JobStatus

from heads import Head, running_head
from raymuse.cli.app import main
from raymuse.clusters.jobserver import JobServer, connect
from raymuse.submit import jobs
from raymuse.tracking.server import Server

Cli = Callable[..., str]
Samples = dict[tuple[str, str], float]
ROW = ("row", "row.vqgan", "row.clip", "row.export")
SMALL = ("train=16", "test=4", "pictures_per_shard=8", "resolution=32")


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Comes up while the head does."""
    with Server.start(tmp_path_factory.mktemp("mlflow"), wait=False) as server:
        yield server


@pytest.fixture(scope="module")
def head(mlflow: Server) -> Iterator[Head]:
    with running_head(variables={"RAY_metrics_report_interval_ms": "500"}) as started:
        yield started


@pytest.fixture
def server(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobServer:
    """The head as a person's shell knows it."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return connect(None)


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line, checks its exit code, and returns all that it printed."""

    def run(*words: object, code: int = 0) -> str:
        capfd.readouterr()
        found = main([str(word) for word in words])
        out = capfd.readouterr()
        assert found == code, out.out + out.err
        return out.out + out.err

    return run


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def submitted(head: Head, flow: Path) -> dict[str, "subprocess.CompletedProcess[str]"]:
    """Two jobs by `ray job submit`, at once: one that makes a flow's data, and one with a wrong key."""
    words = {"right": "train=16", "wrong": "trian=16"}

    def submit(name: str) -> "subprocess.CompletedProcess[str]":
        changes = [word for word in SMALL if not word.startswith("train=")] + [words[name]]
        output = flow / "data" if name == "right" else flow / "no"
        return head.submit(name, "python", "jobs/make_data.py", "demo:data", *changes, f"output={output}")

    with ThreadPoolExecutor() as pool:
        return dict(zip(words, pool.map(submit, words), strict=True))


def test_a_stage_runs_as_a_job(head: Head, submitted: dict[str, "subprocess.CompletedProcess[str]"]) -> None:
    done = submitted["right"]
    assert done.returncode == 0, done.stdout + done.stderr
    output = Path(done.args[-1].partition("=")[2])
    assert str(output) in done.stdout  # the address that the stage prints
    assert head.exit_code("right") == 0
    assert (output / "_SUCCESS").exists()
    assert len(list((output / "train").glob("*.tar"))) == 2


def test_a_wrong_key_fails_the_job_with_code_2_and_says_so(
    head: Head, submitted: dict[str, "subprocess.CompletedProcess[str]"]
) -> None:
    done = submitted["wrong"]
    assert done.returncode != 0
    assert head.exit_code("wrong") == 2
    assert "trian: no such key; did you mean train?" in done.stdout
    assert not Path(done.args[-1].partition("=")[2]).exists()


def test_without_the_token_nothing_is_submitted(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=20)


def test_a_job_takes_its_folder_along_is_stopped_and_goes_on(
    server: JobServer, mlflow: Server, said: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "mine", tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "my.yaml").write_text("extends: demo:data\ntrain: 200000\npictures_per_shard: 50\nresolution: 32\n")
    mlflow.wait()
    words = ("submit", "data", "my.yaml", f"output={output}", "--mlflow", mlflow.uri, "--no-follow")
    text = said(*words)
    name = text.splitlines()[0]
    assert name.startswith("data-my-yaml-")
    assert "before compression; the largest:" in text
    shards_of(output, 1, server, name)
    assert "follow it with `raymuse jobs logs" in said(*words, code=2)
    assert f"{name} is STOPPED; what it finished is kept" in said("jobs", "stop", name)
    first = output / "train" / f"{min(output.glob('_manifest/train-*.json')).stem.removeprefix('train-')}.tar"
    before, count = first.stat().st_mtime_ns, len(list(output.glob("_manifest/train-*.json")))
    monkeypatch.chdir(tmp_path)
    said("jobs", "resume", jobs.last(server, name).submission_id, "--no-follow")
    shards_of(output, count + 1, server, name)
    assert said("jobs", "stop", name).startswith(f"{name}-2 is STOPPED")
    assert "had ended already" in said("jobs", "stop", name)
    assert first.stat().st_mtime_ns == before
    said("jobs", "logs", name, "--follow", code=143)
    listed = said("jobs", "list")
    assert f"{name}-2" in listed
    assert "my.yaml" in listed
    runs = {(job.metadata or {})["raymuse.mlflow_run"] for job in jobs.attempts(server, name)}
    assert len(runs) == 1
    with sqlite3.connect(mlflow.folder / "mlflow.db") as records:
        assert records.execute("SELECT run_uuid FROM runs").fetchall() == [(run,) for run in runs]
        tags = dict(records.execute("SELECT key, value FROM tags").fetchall())
    assert tags["raymuse.submission"] == f"{name}-2"
    assert "submitted from this machine" in said("jobs", "resume", "never", code=2)
    assert "knows no job never" in said("jobs", "logs", "never", code=2)


def shards_of(output: Path, count: int, server: JobServer, name: str) -> None:
    """Wait until a job has committed so many."""
    deadline = time.monotonic() + 300
    while len(list(output.glob("_manifest/train-*.json"))) < count:
        details = jobs.last(server, name)
        assert not JobStatus(details.status).is_terminal(), server.client.get_job_logs(str(details.submission_id))
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def scraping(head: Head) -> Iterator[Samples]:
    """What Prometheus would see while something runs: the last value of each of our metrics, by name and stage."""
    seen: Samples = {}
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1):
            ours = [
                line for line in head.metrics().splitlines() if line.startswith("ray_raymuse_")
            ]  # the rest takes long
            for family in text_string_to_metric_families("\n".join(ours)):
                for sample in family.samples:
                    if sample.labels["submission"].startswith("row."):
                        seen[sample.name.removeprefix("ray_raymuse_"), sample.labels["stage"]] = sample.value

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("submitted")
def test_a_pipeline_is_a_row_of_jobs_under_one_run_and_is_watched(
    server: JobServer, head: Head, mlflow: Server, said: Cli, flow: Path
) -> None:
    changes = ["vqgan.workers=1", "vqgan.steps=3", "vqgan.warm_steps=0", "vqgan.log_every=2"]
    changes += ["clip.workers=0", "clip.steps=2", "clip.batch_size=4", "clip.log_every=2"]
    words = ("smoke", f"workdir={flow}", *changes, "--stages", "vqgan,clip,export")
    with scraping(head) as seen:
        text = said("submit", "--pipeline", *words, "--name", "row", "--mlflow", mlflow.uri, code=2)
    assert f"[vqgan] job row.vqgan -> {flow}/vqgan" in text
    assert f"[clip] job row.clip -> {flow}/clip" in text
    assert "step 3/3" in text
    assert f"{flow}/base" in text  # it was not trained, so that nothing can be exported
    assert "[export] ended with 2: the pipeline submitted again goes on here" in text
    states = {name: jobs.last(server, name).status for name in ROW}
    assert [str(state) for state in states.values()] == ["FAILED", "SUCCEEDED", "SUCCEEDED", "FAILED"]
    assert "`raymuse jobs resume row` goes on" in said("jobs", "resume", "row.vqgan", "--no-follow", code=2)
    runs = {name: (jobs.last(server, name).metadata or {})["raymuse.mlflow_run"] for name in states}
    with sqlite3.connect(mlflow.folder / "mlflow.db") as records:
        parents = dict(records.execute("SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall())
        found = dict(records.execute("SELECT run_uuid, status FROM runs").fetchall())
    assert parents == {run: runs["row"] for name, run in runs.items() if name != "row"}
    assert [found[run] for run in runs.values()] == ["FAILED", "FINISHED", "FINISHED", "FAILED"]
    # The first training ran in a worker of Ray Train, the second in its driver; each counts what it did itself.
    trained = {name: value for (name, stage), value in seen.items() if stage == "train-vqgan"}
    assert (trained["steps_total"], trained["images_total"], trained["queue"]) == (3, 24, 0)
    assert trained["loss"] > 0
    assert trained["rate"] > 0
    assert (seen["steps_total", "train-clip"], seen["images_total", "train-clip"]) == (2, 8)


def test_each_refusal_is_a_sentence(
    server: JobServer, head: Head, mlflow: Server, said: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.wait()
    assert "is no Ray job server" in said("jobs", "list", "--address", mlflow.uri, code=2)
    assert "nothing listens at http://127.0.0.1:1:" in said("jobs", "list", "--address", "127.0.0.1:1", code=2)
    assert "is no address of a job server" in said("jobs", "list", "--address", "ray://127.0.0.1:10001", code=2)
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("not the right one")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    assert f"refuses the token from {other}" in said("jobs", "list", code=2)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "asks for a token" in said("jobs", "list", code=2)
    assert server.token is not None
    assert head.token not in repr(server)


def test_the_doctor_looks_at_the_cluster(head: Head, server: JobServer, mlflow: Server, said: Cli) -> None:
    text = said("doctor", "--address", head.address, "--mlflow", mlflow.uri)
    assert f"ok       cluster       Ray {server.ray_version} at {head.address}, 1 nodes with 4 CPUs" in text
    assert f"ok       mlflow        {mlflow.uri} runs" in text
    assert "within 1 s of the cluster's" in text
    assert "has 0.2 GiB: stages pass pictures through it" in text


def test_the_token_is_nowhere_to_be_read(head: Head, mlflow: Server, server: JobServer, tmp_path: Path) -> None:
    """After all the jobs above; the files of the head's folder hold its logs and the jobs' packages."""
    token, place = head.token.encode(), Path(head.environment["RAY_AUTH_TOKEN_PATH"])
    assert len(server.jobs()) >= 1
    files = [path for folder in (place.parent, mlflow.folder) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-") for path in files)
    assert any(path.name == "mlflow.db" for path in files)
    assert [path for path in files if path != place and token in path.read_bytes()] == []
    for process in psutil.process_iter():
        try:
            assert head.token not in " ".join(process.cmdline()), process.pid
        except psutil.Error:
            continue
    assert all(head.token not in job.model_dump_json() for job in server.jobs())
    assert head.token not in "".join(os.environ.values())
