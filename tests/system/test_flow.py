"""The whole flow with every real part, as a newcomer runs it: `raymuse demo --recipe smoke`, interrupted and resumed.

It runs with no C++ compiler on the PATH, as the README promises.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from raymuse.flow import STAGES
from raymuse.pipeline import Pipeline
from raymuse.tracking.server import Server

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "ninja", "nvcc")


@pytest.fixture(scope="module")
def compilerless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine without a compiler: a PATH of links to everything else."""
    folder = tmp_path_factory.mktemp("bin")
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for tool in Path(place).glob("*") if Path(place).is_dir() else []:
            if not tool.name.startswith(COMPILERS) and os.access(tool, os.X_OK):
                link = folder / tool.name
                link.unlink(missing_ok=True)
                link.symlink_to(tool)
    assert shutil.which("g++", path=str(folder)) is None
    return {**os.environ, "PATH": str(folder)}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, compilerless: dict[str, str]) -> Path:
    """The folder of a smoke flow that was stopped in its base's training."""
    root = tmp_path_factory.mktemp("flow")
    interrupt_in_base_training(root, compilerless)
    return root


@pytest.fixture(scope="module")
def finished(interrupted: Path, compilerless: dict[str, str]) -> Path:
    """The same folder, the flow run to its end."""
    root = interrupted
    done = subprocess.run(command(root), env=compilerless, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (root / "stdout").write_text(done.stdout)
    return root


def command(root: Path) -> list[str]:
    words = ["demo", "--recipe", "smoke", "--json", str(root / "demo.json"), f"workdir={root / 'work'}"]
    return [sys.executable, "-m", "raymuse.cli", *words]


def interrupt_in_base_training(root: Path, environment: dict[str, str]) -> None:
    """Start the flow, press Ctrl-C once the base has a checkpoint, and see that nothing stays behind."""
    running = subprocess.Popen(
        command(root), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    checkpoint = root / "work" / "base" / "step-00000010" / "checkpoint.json"
    deadline = time.monotonic() + 400
    while not checkpoint.exists():
        assert running.poll() is None, running.stdout.read() if running.stdout else ""
        assert time.monotonic() < deadline, "the base training wrote no checkpoint"
        time.sleep(0.005)  # ten steps are left
    family = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130, output[-3000:]
    assert "goes on from there" in output
    _, alive = psutil.wait_procs(family, timeout=20)
    assert [process.cmdline() for process in alive] == []


def test_an_interrupted_flow_keeps_what_it_has_and_tells_no_result(interrupted: Path) -> None:
    work = interrupted / "work"
    assert (work / "tokens" / "_SUCCESS").exists()
    assert not (work / "base" / "_SUCCESS").exists()
    assert not (interrupted / "demo.json").exists()


def test_the_json_holds_every_figure(finished: Path) -> None:
    summary = json.loads((finished / "demo.json").read_text())
    assert set(summary["accuracy"]) == {"truth", "vqgan", "vqgan_low", "base", "cascade"}
    for kind in summary["accuracy"].values():
        assert {"one_object", "two_objects", "attributes"} <= set(kind)
    assert summary["accuracy"]["truth"]["one_object"] == 1.0
    assert set(summary["clip_score"]) == set(summary["accuracy"])
    assert 0 < summary["minutes"] < 10
    assert 0 < summary["peak_rss_gib"] < 10
    assert set(summary["addresses"]) == {"contact_sheet", "mlflow", "serve"}


def test_the_closing_table_names_every_stage_and_address(finished: Path) -> None:
    text = (finished / "stdout").read_text()
    for name in (*STAGES, "total", "contact sheet", "mlflow", "serve"):
        assert name in text


def test_the_interrupted_training_went_on_from_its_checkpoint(finished: Path) -> None:
    """From the very step that Ctrl-C came in, after the checkpoint at 10."""
    lines = (finished / "work" / "base" / "progress.log").read_text().splitlines()
    (kept,) = [int(line.split()[4]) for line in lines if line.startswith("asked to stop: step")]
    assert [int(line.split()[4]) for line in lines if line.startswith("going on from step")] == [kept]
    assert kept > 10


def test_every_prompt_has_its_pictures_and_the_sheets_show_them(finished: Path) -> None:
    work = finished / "work"
    prompts = [json.loads(line)["prompt"] for line in (work / "data" / "prompts.jsonl").read_text().splitlines()]
    page = (work / "images" / "contact_sheet.html").read_text()
    assert all(prompt in page for prompt in prompts)
    sheet = np.array(Image.open(work / "images" / "contact_sheet.png"))
    assert sheet.std() > 10, "the contact sheet is blank"


def test_diffusers_opens_the_base_and_draws(finished: Path) -> None:
    from diffusers import AmusedPipeline

    theirs = AmusedPipeline.from_pretrained(finished / "work" / "model")
    theirs.set_progress_bar_config(disable=True)
    picture = theirs("a large red circle on a white background", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    ours = Pipeline.load(str(finished / "work" / "model"), batch_size=2)
    assert ours(["a large red circle on a white background"], seeds=[0]).pixels.shape == (1, 64, 64, 3)


def test_mlflow_holds_one_parent_run_with_a_child_a_stage(finished: Path) -> None:
    with Server.start(finished / "work" / "mlflow") as server:
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("smoke")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {"flow", *STAGES}
        assert len(client.search_runs([experiment.experiment_id])) == len(STAGES) + 1
        parent = runs["flow"].info.run_id
        assert {runs[name].data.tags["mlflow.parentRunId"] for name in STAGES} == {parent}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        check_training(client, runs["base"])
        check_lineage(client, runs)
        assert runs["flow"].data.metrics["accuracy.truth"] == 1.0
        version = client.get_model_version_by_alias("raymuse-demo", "champion")
        assert version.run_id == parent


def check_lineage(client: MlflowClient, runs: dict[str, Any]) -> None:
    """Every stage says what it read, which run made that, what came of it, by which code, and at what cost."""
    ids = {name: run.info.run_id for name, run in runs.items()}
    reads = {
        "vqgan": {"input": "data"},
        "pretokenize": {"input": "data", "vqgan": "vqgan", "text_encoder": "clip"},
        "base": {"input": "pretokenize", "vqgan": "vqgan"},
        "export": {"base": "base", "superres": "superres", "vqgan": "vqgan", "text_encoder": "clip"},
        "generate": {"prompts": "data", "model": "export"},
        "score": {"images": "generate", "model": "export", "truth": "data"},
    }
    for name, inputs in reads.items():
        tags = runs[name].data.tags
        assert {role: tags.get(f"raymuse.from.{role}") for role in inputs} == {
            role: ids[maker] for role, maker in inputs.items()
        }, name
    for name in STAGES:
        run = runs[name]
        assert run.data.tags["raymuse.outcome"] == "finished", name
        assert run.data.tags["version.torch"], name
        assert run.data.metrics["cost_hours"] > 0, name
        assert run.data.metrics["cost_cpu_hours"] > 0, name
        assert run.data.params["output"], name
        assert run.data.tags["mlflow.note.content"].count("get-artifact") >= (name != "clip"), name
    digests = {
        name: {(one.tags[0].value, one.dataset.digest) for one in run.inputs.dataset_inputs}
        for name, run in runs.items()
    }
    for maker, reader, purpose in (("pretokenize", "base", "training"), ("generate", "score", "eval")):
        (made_digest,) = [digest for context, digest in digests[maker] if context == "output"]
        assert (purpose, made_digest) in digests[reader]
    made = client.get_model_version_by_alias("raymuse-demo", "champion").tags
    assert {made[f"raymuse.from.{name}"] for name in STAGES} == {ids[name] for name in STAGES}


def check_training(client: MlflowClient, run: Any) -> None:
    """The base's curve is whole across the interrupt, and its sample grids stand at their steps."""
    steps = sorted({metric.step for metric in client.get_metric_history(run.info.run_id, "loss")})
    assert steps == [5, 10, 15, 20]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any("step+10" in path or "step_10" in path or "%10" in path for path in images), images
    assert run.data.params["stage"] == "train-base"
