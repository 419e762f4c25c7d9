"""Tracking against a real MLflow server: what is logged arrives once and in order, whatever ends in between."""

import base64
import io
import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import tiny
from faulty import Faulty
from raymuse.config.errors import UserError
from raymuse.pipeline import Pipeline
from raymuse.tracking import sender
from raymuse.tracking.registry import registered_folder
from raymuse.tracking.run import Run, clean, open_run, register
from raymuse.tracking.server import Server, answers, pages

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server.start(folder) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)


def session(leader: int) -> list[int]:
    """The living processes of a server's session."""
    return [p.pid for p in psutil.process_iter() if _in_session(p, leader)]


def _in_session(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def gone_within(seconds: float, leader: int) -> bool:
    limit = time.monotonic() + seconds
    while session(leader) and time.monotonic() < limit:
        time.sleep(0.2)
    return not session(leader)


def leader_of(folder: Path) -> int:
    return int(json.loads((folder / "server.json").read_text())["pid"])


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_everything_of_a_run_arrives(server: Server, client: Any, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    parent = open_run(server.uri, "all", "parent", spool=spool)
    run = open_run(server.uri, "all", "child", parent=parent, tags={"stage": "train"}, spool=spool)
    run.params({"optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]}, "seed": 7, "long": "x" * 9000})
    run.params({f"many.{i}": i for i in range(230)})
    run.metrics({"train/loss": 2.0, "odd name?": 1.0, "bad": math.nan}, step=3)
    run.picture("samples/a cat", Image.new("RGB", (640, 320), "red"), step=3)
    (tmp_path / "recipe.yaml").write_text("seed: 7\n")
    run.file(tmp_path / "recipe.yaml", "config")
    run.text("hello", "notes/hello.txt")
    run.table([{"prompt": "a cat", "score": 0.5}, {"prompt": "a dog"}], "scores.json")
    run.dataset("shapes", "0123456789abcdef" * 4, "s3://bucket/shapes", "training")
    run.note("**what** this is")
    run.parents({"tokens": str(parent.id)})
    assert run.finish()
    assert parent.finish("KILLED")

    assert run.id is not None
    found = client.get_run(run.id)
    assert found.data.tags["mlflow.parentRunId"] == parent.id
    shown = f"![samples~a cat](/get-artifact?path=latest%2Fsamples~a%20cat.png&run_uuid={run.id})"
    assert found.data.tags["mlflow.note.content"] == f"**what** this is\n\n{shown}"
    assert found.data.tags["raymuse.from.tokens"] == parent.id
    assert found.data.tags["stage"] == "train"
    assert found.data.params["optimizer.betas"] == "[0.9, 0.99]"
    assert len(found.data.params["long"]) == 6000
    assert len(found.data.params) == 4 + 230
    assert found.data.metrics["train/loss"] == 2.0
    assert found.data.metrics["odd name_"] == 1.0
    assert math.isnan(found.data.metrics["bad"])
    assert found.info.status == "FINISHED"
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    page = f"/#/experiments/{experiment.experiment_id}?workflowType=machine_learning"
    assert pages(server.port)[experiment.name] == server.uri + page
    assert "Default" not in pages(server.port)
    assert found.inputs.dataset_inputs[0].dataset.name == "shapes"
    assert found.inputs.dataset_inputs[0].tags[0].value == "training"
    pictures = [item.path for item in client.list_artifacts(run.id, "images")]
    assert len(pictures) == 2
    assert all(path.startswith("images/samples~a cat+step+3+timestamp+") for path in pictures)
    assert {Path(path).suffix for path in pictures} == {".png", ".webp"}
    assert {item.path for item in client.list_artifacts(run.id)} == {
        "images",
        "latest",
        "config",
        "notes",
        "scores.json",
    }
    assert [item.path for item in client.list_artifacts(run.id, "latest")] == ["latest/samples~a cat.png"]
    assert json.loads(found.data.tags["mlflow.loggedArtifacts"]) == [{"path": "scores.json", "type": "table"}]
    table = json.loads(Path(client.download_artifacts(run.id, "scores.json", str(tmp_path))).read_text())
    assert table == {"columns": ["prompt", "score"], "data": [["a cat", 0.5], ["a dog", None]]}
    assert client.get_run(parent.id).info.status == "KILLED"
    assert list(spool.iterdir()) == [], "what has arrived leaves nothing behind"


def test_off_does_nothing() -> None:
    run = open_run(None, "off", "off")
    assert run == Run.off()
    run.metrics({"loss": 1.0}, step=1)
    run.picture("p", Image.new("RGB", (8, 8)), step=1)
    assert run.finish()
    assert (run.id, run.link, register(run, "model", "nowhere")) == (None, None, None)


def test_names_are_made_acceptable() -> None:
    assert clean("loss") == "loss"
    assert clean("a=b, c#d") == "a_b_ c_d"
    assert clean("/../a//b/") == "a/b"
    assert clean("../") == "_"
    assert len(clean("x" * 999)) == 250


def test_a_worker_goes_on_with_the_drivers_run(server: Server, client: Any, tmp_path: Path) -> None:
    run = open_run(server.uri, "worker", "one", spool=tmp_path / "driver")
    code = (
        "import pickle, sys; run = pickle.loads(bytes.fromhex(sys.argv[1])); run.metrics({'m': 4}, 9); run.flush(300)"
    )
    assert run_python(code, pickle.dumps(run).hex()).wait(300) == 0
    assert run.flush(300)
    assert client.get_metric_history(run.id, "m")[0].step == 9


def test_a_resumed_run_goes_on_and_keeps_changed_params(
    server: Server, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = open_run(server.uri, "resume", "r", spool=tmp_path)
    first.params({"steps": 10})
    first.finish("FAILED")
    again = open_run(server.uri, "resume", "r", resume=first.id, spool=tmp_path)
    assert client.get_run(first.id).info.status == "RUNNING"
    again.params({"steps": 20, "new": 1})
    again.metrics({"loss": 1}, step=11)
    assert again.finish()
    assert again.id == first.id
    data = client.get_run(first.id).data
    assert (data.params, data.tags["changed.steps"]) == ({"steps": "10", "new": "1"}, "20")
    with pytest.raises(UserError, match="no run 0123abc to resume"):
        open_run(server.uri, "resume", "r", resume="0123abc", spool=tmp_path)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_one_bad_record_holds_nothing_up(
    server: Server, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(server.uri, "bad", "b", spool=tmp_path)
    run.dataset("x" * 501, "0", "s3://x", "training")
    run.metrics({"loss": 1}, step=1)
    assert run.flush()
    assert client.get_run(run.id).data.metrics == {"loss": 1.0}
    assert len(list(tmp_path.glob("*/refused.jsonl"))) == 1
    assert "did not take dataset" in capsys.readouterr().err


def test_a_deleted_run_is_told_once_and_kept(
    server: Server, client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "REFUSED_SECONDS", 0.0)
    run = open_run(server.uri, "refused", "r", spool=tmp_path)
    gone = Run(
        run.identity and type(run.identity)(**vars(run.identity) | {"key": "k", "run_id": uuid.uuid4().hex}), tmp_path
    )
    gone.metrics({"loss": 1}, step=1)
    assert not gone.flush(5)
    assert not gone.flush(5)
    run.metrics({"loss": 2}, step=1)
    assert run.flush(), "another run is not held up"
    err = capsys.readouterr().err
    assert err.count("refuses run r") == 1
    assert "was not deleted" in err
    assert len([path for path in tmp_path.glob("*/records.jsonl") if '"loss":1.0' in path.read_text()]) == 1


def test_registered_models(server: Server, client: Any, tmp_path: Path) -> None:
    import mlflow.artifacts

    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "transformer" / "weights.safetensors").write_bytes(b"w" * 1000)
    run = open_run(server.uri, "registry", "export", spool=tmp_path / "spool")
    picture = Image.new("RGB", (32, 32), "blue")
    assert register(run, "shapes/base", model, "# A card", alias="champion", picture=picture) == "1"
    assert register(run, "shapes/base", "s3://bucket/model", alias="champion") == "2"
    first = client.get_model_version("shapes-base", "1")
    assert first.source.startswith(f"{client.get_run(run.id).info.artifact_uri}/model/")
    assert first.description.startswith("# A card")
    address = first.description.split("](")[1].removesuffix(")")
    with urllib.request.urlopen(server.uri + address) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    assert client.get_model_version_by_alias("shapes-base", "champion").version in (2, "2")
    there = mlflow.artifacts.download_artifacts(first.source, tracking_uri=server.uri, dst_path=str(tmp_path / "there"))
    assert (Path(there) / "transformer" / "weights.safetensors").read_bytes() == b"w" * 1000
    old = f"runs:/{run.id}/{first.source.split('/artifacts/')[1]}"  # as versions were registered before
    client.create_model_version("shapes-base", old, run_id=run.id)
    for number in (1, 3):
        folder = Path(registered_folder(f"models:/shapes-base/{number}", server.uri, tmp_path / "cache"))
        assert (folder / "transformer" / "weights.safetensors").read_bytes() == b"w" * 1000
    with pytest.raises(UserError, match="alias"):
        register(run, "shapes", model, alias="v1")


@pytest.fixture(scope="module")
def registered(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model, registered under its alias; its own folder is gone since."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("registered")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    model = tiny.write_model(root / "model", encoders, cascade=True)
    run = open_run(server.uri, "registry", "export", spool=root / "spool")
    assert register(run, "drawing", model, alias="champion") == "1"
    shutil.move(model, root / "kept")
    return str(root / "kept")


@pytest.mark.parametrize("address", ["models:/drawing@champion", "models:/drawing/1", "models:/drawing/latest"])
def test_a_registered_model_is_a_folder_that_draws(
    address: str, registered: str, server: Server, tmp_path: Path
) -> None:
    folder = registered_folder(address, server.uri, tmp_path)
    one, other = (Pipeline.load(place, batch_size=1)(["a star"], seeds=[7]).pixels for place in (folder, registered))
    np.testing.assert_array_equal(one, other)
    fetched = Path(folder).stat().st_mtime_ns
    assert Path(registered_folder(address, server.uri, tmp_path)).stat().st_mtime_ns == fetched


def test_mlflow_itself_loads_a_registered_model(
    registered: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(server.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/drawing@champion")
    finally:
        mlflow.set_tracking_uri(None)
    rows = [
        {"prompt": "a star", "seed": 7, "steps": 3},
        {"prompt": "a circle", "seed": 8, "steps": 2, "negative": "red"},
    ]
    drawn = model.predict(pd.DataFrame(rows))
    assert list(drawn["seed"]) == [7, 8]
    pipeline = Pipeline.load(registered)
    alone = [
        pipeline(["a star"], seeds=[7], steps=3).pixels[0],
        pipeline(["a circle"], seeds=[8], steps=2, negative="red").pixels[0],
    ]
    for image, expected in zip(drawn["image"], alone, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(image)))
        np.testing.assert_array_equal(np.asarray(picture), expected)
    assert [column.name for column in model.metadata.signature.inputs] == [
        "prompt",
        "negative",
        "seed",
        "steps",
        "guidance",
    ]
    assert not list(Path(registered).rglob("*.pkl"))


def test_what_a_registry_does_not_have_is_a_sentence(registered: str, server: Server, tmp_path: Path) -> None:
    run = open_run(server.uri, "registry", "far", spool=tmp_path / "spool")
    assert register(run, "far", "s3://bucket/model", alias="champion") == "1"
    for address, uri, said in [
        ("models:/drawing", server.uri, "write models:/NAME@ALIAS"),
        ("models:/drawing@loser", server.uri, "does not give drawing"),
        ("models:/nothing/latest", server.uri, "has no model nothing"),
        ("models:/drawing@champion", None, "MLFLOW_TRACKING_URI"),
        (
            "models:/far@champion",
            server.uri,
            "registered without its weights, as version 1, and s3://bucket/model is not",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            registered_folder(address, uri, tmp_path / "cache")


def test_slow_lossy_refusing_and_absent_servers_cost_no_step_and_double_nothing(
    server: Server, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run through all of it: its records arrive once and in order when the network is well again."""
    monkeypatch.setattr(sender, "REFUSED_SECONDS", 0.2)
    monkeypatch.setattr(sender, "PAUSES", (0.2,))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with Faulty(server.port) as net:
        net.mood = "refused"
        run = open_run(net.uri, "faults", "all", resume="pending-faults", spool=tmp_path / "spool", patience=10)
        assert run.id == "pending-faults", "a server that refuses stops nobody"
        step, moods = 0, ("refused", "lossy", "cut", "slow", "lossy", "well")
        for mood in moods:
            net.mood = mood
            began = time.perf_counter()
            for _ in range(20):
                step += 1
                run.metrics({"loss": step}, step)
            assert time.perf_counter() - began < net.delay, "logging waits for nobody"
            run.picture("grid", Image.new("RGB", (16, 16), (step, 0, 0)), step)
            run.params({f"during {mood}": step})
            run.dataset(mood, str(step), f"s3://bucket/{mood}", "training")
            run.note(f"step {step}")
            run.flush(3)
        net.mood = "lossy"
        register(run, "faults", tmp_path / "model", alias="champion", timeout=1)
        run.flush(5)
        net.mood = "well"
        assert run.finish(timeout=300)
        assert net.lost > 10
    rows = client.get_metric_history(run.id, "loss")
    assert [(row.step, row.value) for row in rows] == [(number, number) for number in range(1, step + 1)]
    assert len(client.list_artifacts(run.id, "images")) == 2 * len(moods)
    found = client.get_run(run.id)
    assert {name: int(value) for name, value in found.data.params.items()} == {
        **{f"during {mood}": 20 * (number + 1) for number, mood in enumerate(moods)},
        "during lossy": 40,
    }
    assert found.data.tags["changed.during lossy"] == "100"
    assert sorted(one.dataset.name for one in found.inputs.dataset_inputs) == sorted(moods)
    assert found.data.tags["mlflow.note.content"].startswith(f"step {step}\n\n![grid]")
    assert found.data.tags["mlflow.note.content"].count("![") == 1
    assert len(client.search_runs([found.info.experiment_id])) == 1
    assert len(client.search_model_versions("name = 'faults'")) == 1
    assert "--allowed-hosts" in capsys.readouterr().err
    assert list((tmp_path / "spool").iterdir()) == []


LOG_AND_DIE = """
import os, pathlib, signal, sys
from raymuse.tracking.run import open_run
run = open_run(sys.argv[1], "killed", "victim", spool=pathlib.Path(sys.argv[2]), resume=sys.argv[3] or None)
print(run.id, flush=True)
for step in range(500):
    run.metrics({"loss": step}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writers_rest_is_sent_by_the_next_process(server: Server, client: Any, tmp_path: Path) -> None:
    victim = run_python(LOG_AND_DIE, server.uri, tmp_path, "")
    assert victim.stdout is not None
    name = victim.stdout.readline().strip()
    assert victim.wait(300) == -signal.SIGKILL
    (segment,) = tmp_path.iterdir()
    with open(segment / "records.jsonl", "a") as torn:
        torn.write('{"do":"metrics","val')
    run = open_run(server.uri, "killed", "victim", resume=name, spool=tmp_path)
    run.metrics({"loss": 500}, step=500)
    (segment / "sent").unlink(missing_ok=True)  # as if it had been killed between a send and noting it
    assert run.finish(timeout=300)
    rows = client.get_metric_history(run.id, "loss")
    assert sorted(row.step for row in rows) == list(range(501))
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_joins(folder: Path, server: Server) -> None:
    with Server.start(folder) as joined:
        assert (joined.uri, joined.owned, server.owned) == (server.uri, False, True)
    assert answers(server.port), "leaving a joined server leaves it running"
    with pytest.raises(UserError, match=f"already runs on port {server.port}"):
        Server.start(folder, port=server.port + 1)


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"Port \d+ on 127.0.0.1 is taken"):
            Server.start(tmp_path, port=taken.getsockname()[1])


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a data base " * 100)
    with pytest.raises(UserError, match=r"ended before it answered(.|\n)*not a database"):
        Server.start(tmp_path)
    assert session(leader_of(tmp_path)) == []


START_AND_SLEEP = """
import pathlib, sys, time
from raymuse.tracking.server import Server
Server.start(pathlib.Path(sys.argv[1]), wait=sys.argv[2] == "wait")
print("up", flush=True)
time.sleep(600)
"""


def test_a_start_in_the_middle_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    parent = run_python(START_AND_SLEEP, tmp_path, "starting")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    leader = leader_of(tmp_path)
    assert session(leader)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone_within(60, leader)


def test_it_is_one_process_and_a_killed_one_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    with Server.start(tmp_path) as server:
        leader = leader_of(tmp_path)
        assert session(leader) == [leader]
        os.kill(leader, signal.SIGKILL)
        assert gone_within(60, leader)
        with Server.start(tmp_path, wait=False) as second:
            assert second.owned
            fresh = leader_of(tmp_path)
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", second.port))  # though nothing listens there yet
        assert session(fresh) == []
        server.stop()
        server.stop()


def test_importing_is_cheap() -> None:
    """Of a driver, and of a rank: DeepSpeed alone would bring MLflow."""
    driver = "import sys, raymuse.tracking.run, raymuse.tracking.server; print({'mlflow', 'PIL'} & set(sys.modules))"
    assert run_python(driver).communicate(timeout=300)[0] == "set()\n"
    rank = "import sys; from raymuse.training import zero; zero._import_deepspeed(); print('mlflow' in sys.modules)"
    assert run_python(rank).communicate(timeout=300)[0].endswith("False\n")


TRACE_TO_NOBODY = """
import sys, time
from raymuse.tracking.traces import MOST_WAITING, Trace, Traces
lost = []
traces = Traces(sys.argv[1], lambda: lost.append(1))
began = time.perf_counter()
taken = [traces.send(Trace(str(number), "POST /", {}).ended({})) for number in range(MOST_WAITING + 10)]
seconds = time.perf_counter() - began
print(taken.count(True) - MOST_WAITING, taken.count(False), len(lost), seconds)
"""


def test_traces_of_requests_wait_for_no_server_and_do_not_pile_up() -> None:
    given = [sys.executable, "-c", TRACE_TO_NOBODY, "http://127.0.0.1:9"]
    done = subprocess.run(given, capture_output=True, text=True, check=True, timeout=300)
    more, dropped, lost, seconds = map(float, done.stdout.split())
    assert 0 <= more <= 1  # one is in the hands of the thread that sends
    assert dropped >= 9
    assert lost == dropped
    assert seconds < 1


THREE_TRACES = """
import sys
from raymuse.tracking.traces import Trace, Traces
lost = []
traces = Traces(sys.argv[1], lambda: lost.append(1))
for number in range(3):
    trace = Trace(f"kept-{number}", "POST /", {"prompt": "a star"})
    with trace.span("draw"):
        pass
    assert traces.send(trace.ended({"seeds": [number]}))
for _ in sys.stdin:
    print(len(lost), flush=True)
"""


@contextmanager
def three_traces(uri: str, **variables: str) -> Iterator[Callable[[], int]]:
    """A process that sends three traces; who calls is told how many it knows to be lost."""
    with subprocess.Popen(
        [sys.executable, "-c", THREE_TRACES, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
        env={**os.environ, **variables},
    ) as process:

        def lost() -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("how many?\n")
            return int(process.stdout.readline())

        try:
            yield lost
        finally:
            process.kill()


def test_traces_of_an_outage_arrive_when_it_is_over_and_those_that_never_do_are_counted(server: Server) -> None:
    with Faulty(server.port) as net:
        net.mood = "cut"
        with three_traces(net.uri) as lost:
            assert net.cut_off.wait(180), "nobody asked while there was no server"
            net.mood = "well"
            found = arrived_at(server.uri, 3)
            assert lost() == 0
    sampled_away = {"MLFLOW_TRACE_SAMPLING_RATIO": "0", "MLFLOW_EXPERIMENT_NAME": "sampled away"}
    with three_traces(server.uri, **sampled_away) as lost:
        limit = time.monotonic() + 180
        while lost() < 3 and time.monotonic() < limit:
            time.sleep(0.2)
        assert lost() == 3
    assert {one.info.tags["request_id"] for one in found} == {f"kept-{number}" for number in range(3)}
    assert [[span.name for span in one.data.spans] for one in found] == [["POST /", "draw"]] * 3


def arrived_at(uri: str, count: int) -> list[Any]:
    """The served requests' traces at a server, once there are so many, the oldest first."""
    from mlflow import MlflowClient

    client, limit = MlflowClient(tracking_uri=uri), time.monotonic() + 180
    found: list[Any] = []
    while len(found) < count and time.monotonic() < limit:
        time.sleep(0.5)
        if (experiment := client.get_experiment_by_name("raymuse-serving")) is not None:
            found = client.search_traces(locations=[experiment.experiment_id], order_by=["timestamp_ms ASC"])
            found = [one for one in found if "request_id" in one.info.tags]
    return found


def test_an_outage_loses_nothing(folder: Path, server: Server, tmp_path: Path) -> None:
    """The last to use the module's server: it is stopped in the middle, and that of another process takes its place."""
    run = open_run(server.uri, "outage", "early", spool=tmp_path / "spool")
    run.metrics({"loss": 0}, step=0)
    assert run.flush()
    server.stop()
    slowest, spent = 0.0, 0.0
    late = open_run(server.uri, "outage", "late", parent=run, spool=tmp_path / "spool")
    assert late.id is not None
    assert late.id.startswith("pending-")
    for step in range(1, 301):
        began = time.perf_counter()
        run.metrics({"loss": step, "lr": 1 / step}, step=step)
        late.metrics({"loss": -step}, step=step)
        if step % 100 == 0:
            run.picture("grid", Image.effect_noise((512, 512), 50), step=step)
        took = time.perf_counter() - began
        slowest, spent = max(slowest, took), spent + took
    print(f"300 steps in {spent:.3f} s while the server is away, the slowest {slowest * 1e3:.1f} ms")
    assert spent / 300 < 0.02
    assert not run.flush(1)
    parent = run_python(START_AND_SLEEP, folder, "wait")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    with Server.start(folder) as second:
        assert (second.port, second.owned) == (server.port, False)
        began = time.perf_counter()
        assert run.finish(timeout=300)
        print(f"all sent {time.perf_counter() - began:.1f} s after the server was back")
        assert late.finish(timeout=300)
        from mlflow import MlflowClient

        there = MlflowClient(tracking_uri=second.uri)
        for name, sign, count in (("early", 1, 301), ("late", -1, 300)):
            one = run if name == "early" else late
            rows = there.get_metric_history(one.id, "loss")
            assert [(row.step, row.value * sign) for row in rows] == [(i, i) for i in range(301 - count, 301)]
            assert [row.timestamp for row in rows] == sorted(row.timestamp for row in rows)
        assert len(there.list_artifacts(run.id, "images")) == 6
        assert late.id is not None
        assert there.get_run(late.id).data.tags["mlflow.parentRunId"] == run.id
        assert len(there.search_runs([there.get_run(run.id).info.experiment_id])) == 2
    assert list((tmp_path / "spool").iterdir()) == []
    leader = leader_of(folder)
    assert session(leader) == [leader]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone_within(60, leader), "a server outlives no parent that is killed"
