"""What MLflow's runs and models say of the work, read through its client, `raymuse runs`, and in Debian's Chromium."""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from browser import Browser
from raymuse import recording
from raymuse.cli.app import main
from raymuse.config.base import StageConfig
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.export import ExportConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig
from raymuse.recording import Made, fingerprint, inputs_of, recorded, run_of
from raymuse.stages.export import export
from raymuse.storage.checkpoint import newest
from raymuse.tracking import machine
from raymuse.tracking.compare import Comparison
from raymuse.tracking.machine import monitored, parse_gpus
from raymuse.tracking.reading import Reader, Seen
from raymuse.tracking.run import Run, finishing, open_again, open_run
from raymuse.tracking.server import Server
from raymuse.training.alone import opened, train_alone
from raymuse.training.lineage import lineage

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
EXPERIMENT = "shapes"
TRAINING = "?workflowType=machine_learning"
SECONDS = 300  # that a page may take on a busy machine


@dataclass(frozen=True)
class Work:
    """A small flow without Ray, each stage with its run, as the command line would have it."""

    server: Server
    spool: Path
    root: Path
    tokens: Run
    slow: Run
    quick: Run
    export: Run
    exporting: ExportConfig

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.server.uri, registry_uri=self.server.uri)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("browsing")
    with Server.start(root / "mlflow", wait=False) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "SECONDS", 0.2)
        shards = tiny.write_shards(root / "shards")
        encoders = tiny.write_encoders(root / "encoders", shards)
        server.wait(300)
        spool = root / "spool"

        def stage(name: str, config: StageConfig, do: Any) -> Run:
            run = open_run(server.uri, EXPERIMENT, name, spool=spool, patience=120)
            with finishing(run), recorded(config, run):
                do(config, run)
            return run

        told = {"input": shards, "vqgan": encoders, "text_encoder": encoders, "resolution": tiny.SIDE}
        pretokenizing = PretokenizeConfig(output=str(root / "tokens"), **told)
        tokens = stage("tokens", pretokenizing, lambda *_: tiny.write_tokens(root / "tokens", shards, encoders))
        runs = {}
        for name, rate in (("slow", 1e-3), ("quick", 3e-3)):
            config = tiny.base_config(
                root / name,
                str(root / "tokens"),
                vqgan=encoders,
                steps=6,
                log_every=2,
                sample_every=3,
                ids="image_ids",
                optimizer={"lr": rate, "warmup_steps": 3},
                peak_tflops=0.1,
            )
            runs[name] = stage(name, config, lambda config, run: train_alone(config, run, opened(config)))
        exporting = ExportConfig(
            output=str(root / "model"),
            vqgan=encoders,
            text_encoder=encoders,
            base=str(root / "quick" / "base"),
            name="shapes-model",
            alias="champion",
        )
        exported = stage("export", exporting, export)
        yield Work(server, spool, root, tokens, runs["slow"], runs["quick"], exported, exporting)


def test_a_training_says_what_went_in_and_what_it_descends_from(work: Work) -> None:
    run = work.client.get_run(work.quick.id)
    tags, params = run.data.tags, run.data.params
    assert tags["raymuse.from.input"] == work.tokens.id
    (given,) = run.inputs.dataset_inputs
    made = {one.tags[0].value: one.dataset for one in work.client.get_run(work.tokens.id).inputs.dataset_inputs}
    assert given.dataset.digest == made["output"].digest == fingerprint(str(work.root / "tokens"))[0][:36]
    assert given.tags[0].value == "training"
    assert json.loads(given.dataset.profile) == {"num_rows": 48}
    assert made["source"].digest != made["output"].digest
    assert (params["optimizer.lr"], params["stage"]) == ("0.003", "train-base")
    assert tags["version.torch"] == torch.__version__
    assert tags["mlflow.source.name"] == "raymuse train"
    assert tags["raymuse.commit"].removesuffix("-dirty") == tags["mlflow.source.git.commit"]
    artifacts = {one.path for one in work.client.list_artifacts(work.quick.id)}
    assert {"config.yaml", "versions.txt", "images", "latest"} <= artifacts


def test_a_training_says_how_it_went_and_what_it_looks_like(work: Work) -> None:
    client = work.client
    run = client.get_run(work.quick.id)
    assert [one.step for one in client.get_metric_history(work.quick.id, "loss")] == [2, 4, 6]
    assert run.data.metrics["memory_gib"] > 0.01
    assert 0 < run.data.metrics["mfu"] < 1
    assert run.data.metrics["cost_hours"] > 0
    assert 0 <= run.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 100
    steps = {one.path.split("+step+")[1].split("+")[0] for one in client.list_artifacts(work.quick.id, "images")}
    assert steps == {"0", "3", "6"}
    note = run.data.tags["mlflow.note.content"]
    assert "finished" in note
    assert f"made by [pretokenize](#/runs/{work.tokens.id}?workflowType=machine_learning)" in note
    assert note.count("![samples](/get-artifact?path=latest%2Fsamples.png&run_uuid=") == 1
    assert run.data.tags["raymuse.outcome"] == "finished"


def test_a_checkpoint_says_what_it_descends_from(work: Work) -> None:
    found = newest(work.root / "quick" / "base")
    assert found is not None
    lineage = found.state["lineage"]
    claimed = json.loads((work.root / "quick/base/_manifest/config.json").read_text())
    assert lineage["run"] == work.quick.id
    assert lineage["data"] == claimed["data"]
    assert Made.read(str(work.root / "quick/base/model")) == Made.read(str(work.root / "quick/base"))


def test_a_model_version_has_lineage_and_is_made_once(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    client = work.client
    version = client.get_model_version_by_alias("shapes-model", "champion")
    assert version.run_id == work.export.id
    assert version.tags["raymuse.from.base"] == work.quick.id
    assert version.tags["raymuse.from.export"] == work.export.id
    assert "A masked-image text-to-image model" in version.description
    assert "get-artifact" in version.description
    again = open_again(work.server.uri, EXPERIMENT, "export", str(work.export.id))
    with finishing(again), recorded(work.exporting, again):
        export(work.exporting, again)
    assert len(client.search_model_versions("name = 'shapes-model'")) == 1
    assert "models:/shapes-model@champion is version 1" in capsys.readouterr().out
    assert client.get_run(work.export.id).data.metrics["cost_hours"] > 0
    with pytest.raises(UserError, match="no MLflow is named"):
        export(work.exporting, Run.off())


def test_how_a_stage_ends_is_said(work: Work, tmp_path: Path) -> None:
    config = tiny.base_config(tmp_path, str(tmp_path / "nothing"))

    def ends(error: BaseException) -> str:
        run = open_run(work.server.uri, EXPERIMENT, "ends", spool=work.spool)
        with pytest.raises(type(error)), finishing(run), recorded(config, run):
            raise error
        return str(work.client.get_run(run.id).data.tags["raymuse.outcome"])

    assert ends(UserError("no such\nthing")) == "failed: no such thing"
    assert ends(KeyboardInterrupt()) == "stopped; the same command goes on"
    assert ends(TooManyRejects(3, 4, "rejects")).startswith("finished, but: ")
    assert not Path(config.output).exists(), "who only looks at the work writes nothing where it was refused"


def test_a_finished_folder_keeps_its_maker(work: Work) -> None:
    config = tiny.base_config(work.root / "quick", str(work.root / "tokens"))
    before = Made.read(config.output)
    run = open_run(work.server.uri, EXPERIMENT, "again", spool=work.spool)
    with finishing(run), recorded(config, run):
        pass
    assert Made.read(config.output) == before
    assert before is not None
    assert before.run == work.quick.id


def test_a_run_that_was_deleted_is_begun_anew(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_again(work.server.uri, EXPERIMENT, "anew", "0123abcd")
    assert run.finish()
    assert run.id not in (None, "0123abcd")
    assert "begun" in capsys.readouterr().err


def test_fingerprints_of_what_no_stage_made(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a star\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"1")
    file, folder = fingerprint(str(tmp_path / "p.txt")), fingerprint(str(tmp_path / "folder"))
    (tmp_path / "folder" / "a.png").write_bytes(b"22")
    assert fingerprint(str(tmp_path / "folder")) != folder
    (tmp_path / "p.txt").write_text("a starfish\n")
    assert fingerprint(str(tmp_path / "p.txt")) != file
    with pytest.raises(UserError, match="no such file"):
        fingerprint(str(tmp_path / "nothing"))
    assert recording.Made.read(str(tmp_path / "nothing")) is None
    told = {"vqgan": "v", "text_encoder": "t", "resolution": 32, "output": "o"}
    several = PretokenizeConfig(input=(str(tmp_path / "p.txt"), str(tmp_path / "nothing")), **told)
    found = {one.role: one.digest for one in inputs_of(several)}
    assert set(found) == {"input.0", "input.1", "vqgan", "text_encoder"}
    assert found["input.0"]
    assert not found["input.1"]


def test_work_goes_on_in_the_run_that_it_was_begun_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here while the server is away: a port that nobody listens on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    config = BaseConfig(input=str(tmp_path), output=str(tmp_path / "out"), steps=1)
    begun = run_of(config, uri, "tests", "first lora")
    (tmp_path / "out" / "_manifest").mkdir(parents=True)
    (tmp_path / "out" / recording.CONFIG).write_text("{}")
    for stage, goes_on in (("train-base", True), ("train-superres", False)):
        made = {"run": begun.id, "server": uri, "stage": stage}
        (tmp_path / "out" / recording.MADE_BY).write_text(json.dumps(made))
        assert (run_of(config, uri, "tests", "first lora").id == begun.id) is goes_on
    assert run_of(config, None, "tests").id is None


def test_a_training_that_encodes_as_it_runs_has_read_the_pictures(tmp_path: Path) -> None:
    """And not the token shards that its recipe names; the held-out ones are there to evaluate."""
    for name in ("pictures", "tokens", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(name.encode())
    places = {name: str(tmp_path / name) for name in ("pictures", "tokens", "held")}
    stream = {"input": places["pictures"], "vqgan": "v", "text_encoder": "t"}
    values = {"input": places["tokens"], "output": str(tmp_path / "out"), "steps": 1, "stream": stream}
    config = BaseConfig(**{**values, "evaluation": {"input": places["held"]}})
    read = {one.role: one.digest for one in inputs_of(config)}
    assert read == {
        "stream.input": fingerprint(places["pictures"])[0],
        "stream.vqgan": "",
        "stream.text_encoder": "",
        "evaluation.input": fingerprint(places["held"])[0],
    }
    assert lineage(config)["input"] == places["pictures"]


def test_system_metrics_are_told_while_the_work_goes_on() -> None:
    class Heard(Run):
        def metrics(self, values: Any, step: int) -> None:
            heard.append((dict(values), step))

    heard: list[tuple[dict[str, float], int]] = []
    off = Run.off()
    with monitored(Heard(off.identity, off.spool), seconds=0.01):
        time.sleep(0.05)
    assert heard == [], "a run that is off is told nothing"
    table = "93, 1024, 2048, 301.5\n0, [N/A], [N/A], [N/A]\n"
    assert parse_gpus(table) == {
        "gpu_0_utilization_percentage": 93.0,
        "gpu_0_memory_usage_megabytes": pytest.approx(1073.74, abs=0.01),
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_0_power_usage_watts": 301.5,
        "gpu_1_utilization_percentage": 0.0,
    }


# --- raymuse runs


def test_runs_are_listed(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--mlflow", work.server.uri, "--stage", "train-base", "--limit", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["id", "experiment", "name", "stage"]
    names = [line.split()[2] for line in lines[1:]]
    assert {"quick", "slow"} <= set(names)
    assert names.index("quick") < names.index("slow"), "the newest first"
    assert main(["runs", "list", "--mlflow", work.server.uri, "--experiment", "nothing"]) == 2
    assert f"no experiment nothing; there are: Default, {EXPERIMENT}" in capsys.readouterr().err


def test_two_runs_are_compared(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in ("html", "png"):
        out = tmp_path / f"both.{ending}"
        words = ["runs", "compare", f"{EXPERIMENT}/slow", str(work.quick.id)[:12], "--out", str(out)]
        assert main([*words, "--mlflow", work.server.uri]) == 0
    said = capsys.readouterr().out
    (rate,) = [line for line in said.splitlines() if "optimizer.lr" in line][:1]
    assert rate.split() == ["optimizer.lr", "0.001", "0.003"]
    assert "no difference in data" in said
    assert "picture samples: of both" in said
    page = (tmp_path / "both.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "optimizer.lr" in page
    picture = np.asarray(Image.open(tmp_path / "both.png"))
    assert picture.shape[1] > 700
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing", "quick"], "has no run nothing"),
        (["twin", "quick"], r"twin means 2 runs; give the id of one(.|\n)*shapes/twin"),
        (["slow", "quick", "--out", "a.gif"], "a comparison is .html or .png"),
        (["slow", "quick", "--out", "nowhere/a.png"], "there is no folder"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(
    words: list[str], said: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "twin" and not [run for run in Reader(work.server.uri).runs() if run.name == "twin"]:
        for _ in range(2):
            assert open_run(work.server.uri, EXPERIMENT, "twin", spool=work.spool).finish()
    assert main(["runs", "compare", *words, "--mlflow", work.server.uri]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_server_that_is_not_there_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert main(["runs", "list", "--mlflow", f"http://127.0.0.1:{port}"]) == 2
    assert f"raymuse doctor --mlflow http://127.0.0.1:{port}" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["runs", "list"]) == 2
    assert "no MLflow server is named" in capsys.readouterr().err
    assert main(["runs", "list", "--workdir", str(tmp_path)]) == 2
    assert "no MLflow records" in capsys.readouterr().err


def test_a_comparison_says_who_alone_has_what() -> None:
    one = Seen("1" * 32, "a", "e", "FINISHED", 0, 60_000, {"x": "1"}, {"loss": 2.0}, {"version.torch": "1"})
    other = Seen("2" * 32, "b", "e", "RUNNING", 0, None, {}, {"loss": 1.0, "system/cpu": 3.0}, {"other": "1"})
    made = Comparison.of(one, other, ({"samples": Path("a.png")}, {}))
    assert made.config == [("x", "1", "")]
    assert made.code == [("version.torch", "1", "")]
    assert made.metrics == [("loss", 2.0, 1.0)]
    assert "-1 (-50.0%)" in made.text()
    assert "picture samples: of the first alone" in made.text()


# --- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
def test_a_person_browses_runs_pictures_and_models(work: Work, tmp_path: Path) -> None:
    """Screenshots are left in $SCREENSHOTS, where that is set, to be looked at."""
    shots = Path(os.environ.get("SCREENSHOTS", tmp_path))
    experiment = work.client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = f"{work.server.uri}/#/experiments/{experiment}"
    with Browser(tmp_path / "home") as page:
        page.open(f"{runs}/runs{TRAINING}")
        see(page, "quick", "slow", "export", "tokens")
        page.evaluate(CLOSE_THE_ASSISTANT)
        page.screenshot(shots / "experiment.png")
        page.open(str(work.quick.link))
        see(page, "train-base", "made by", "pretokenize", "came out")
        page.wait_for(LOADED.format("latest%2Fsamples.png"), SECONDS)
        page.evaluate(SHOW_MORE)
        page.screenshot(shots / "run.png")
        made_by = page.evaluate("[...document.links].find((link) => link.textContent === 'pretokenize').href")
        page.open(made_by)
        page.wait_for(f"location.hash.includes('/{experiment}/runs/{work.tokens.id}')", SECONDS)
        see(page, "to ", "tokens: finished")
        page.open(f"{runs}/runs/{work.quick.id}/model-metrics{TRAINING}")
        see(page, "accuracy")
        page.wait_for(f"{TO_THE_END} || {LOADED.format('images%2Fsamples%2Bstep%2B0')}", SECONDS)
        page.screenshot(shots / "grid.png")
        page.open(f"{runs}/runs/{work.quick.id}/system-metrics{TRAINING}")
        see(page, "cpu_utilization_percentage")
        page.screenshot(shots / "system.png")
        page.open(f"{work.server.uri}/#/models/shapes-model/versions/1")
        see(page, "champion", "raymuse.from.base", str(work.quick.id), "A masked-image text-to-image model")
        page.wait_for(LOADED.format("samples.png"), SECONDS)
        page.screenshot(shots / "model.png")
        see(page, "Inputs (5)", "Outputs (2)")
        for name in ("Inputs (5)", "Outputs (2)"):
            page.evaluate(OPEN_THE_LIST.format(json.dumps(name)))
        see(page, "prompt", "guidance", "image")
        page.evaluate(TO_THE_END)
        page.screenshot(shots / "schema.png")
    for name in ("experiment", "run", "grid", "system", "model", "schema"):
        assert len(np.unique(np.asarray(Image.open(shots / f"{name}.png")))) > 50


BUTTON = "[...document.querySelectorAll('button')].find((one) => {})?.click()"
CLOSE_THE_ASSISTANT = BUTTON.format("one.dataset.componentId?.endsWith('chat_panel.close')")
OPEN_THE_LIST = "[...document.querySelectorAll('*')].filter((one) => one.innerText?.trim() === {}).at(-1).click()"
SHOW_MORE = BUTTON.format("one.innerText === 'Show more'")
TO_THE_END = """[...document.querySelectorAll("*")]
.filter((one) => one.clientHeight > 400 && one.scrollHeight > one.clientHeight + 20)
.forEach((one) => { one.scrollTop = one.scrollHeight; })"""
LOADED = "[...document.images].some((image) => image.src.includes('{}') && image.complete && image.naturalWidth > 30)"


def see(page: Browser, *words: str) -> None:
    """Wait until a page shows every one of some words."""
    for word in words:
        page.wait_for(f"document.body?.innerText.includes({json.dumps(word)}) ?? false", SECONDS)
