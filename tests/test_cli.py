"""The command line: quick, helpful, and with the exit codes that it promises."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

import tiny
from raymuse.cli.app import _failed, main, version_problem
from raymuse.cli.words import is_data, split
from raymuse.config.errors import ConfigError, TooManyRejects, UserError
from raymuse.config.load import load

ROOT = Path(__file__).parents[1]
COMMANDS = [
    "demo",
    "styledrop",
    "data",
    "train",
    "pretokenize",
    "tokens",
    "export",
    "generate",
    "batch",
    "edit",
    "serve",
    "verify-weights",
    "score",
    "ui",
    "runs",
]
COMMANDS += ["submit", "jobs", "doctor", "config", "cluster"]
HEAVY = {"ray", "torch", "deepspeed", "mlflow", "pydantic", "rich", "numpy"}


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(words) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_help_names_every_command_on_one_line_in_the_order_of_the_flow(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--help").partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines[: len(COMMANDS)]] == COMMANDS
    assert all(line.endswith(".") and "..." not in line for line in lines[: len(COMMANDS)])


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys; from raymuse.cli.app import main; code = main(['--help'])\n"
        f"print('HEAVY', sorted({HEAVY} & set(sys.modules))); sys.exit(code)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "HEAVY []")
    assert time.monotonic() - start < 2  # 0.1 s on an idle machine


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "raymuse.cli", "nope"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "No such command 'nope'" in done.stderr


def test_another_python_is_one_sentence_before_any_import() -> None:
    assert version_problem((3, 11)) is None
    assert version_problem((3, 12)) is None
    code = (
        "import sys; real = sys.version_info; sys.version_info = (3, 13, 0, 'final', 0)\n"
        "from raymuse.cli.app import main; code = main([]); print('typer' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (2, "False")
    assert "runs on Python 3.11 and 3.12, and this is 3.13" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train"], "raymuse train needs a recipe: demo:vqgan"),
        (["train", "steps=3"], "raymuse train needs a recipe"),
        (["pretokenize"], "smoke:pretokenize, tokens-256, tokens-512, tokens-superres-512, or a YAML file of your own"),
        (["train", "demo:data"], "run it with `raymuse data demo:data`"),
        (["train", "demo:base", "--dry-run", "setps=3"], "did you mean steps?"),
        (["export", "demo"], "this command takes demo:export"),
        (["serve"], "needs a model folder"),
        (["serve", "runs/none", "prot=1"], "did you mean port?"),
        (["data", "shaeps"], "there is no recipe 'shaeps'"),
        (["data", "emoji", "train=0"], "train: must be at least 1, was 0"),
        (["demo", "base.steps=0"], "base.steps: must be at least 1, was 0"),
        (["demo", "--recipe", "demo:base"], "run it with `raymuse train demo:base`"),
        (["demo", "--json", "nowhere/it.json"], "there is no folder"),
        (["ui", "--workdir", "nowhere"], "there are no MLflow records in nowhere"),
        (["config", "check", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["cluster", "check", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["generate", "--nope"], "No such option"),
    ],
)
def test_bad_usage_is_a_sentence_and_exit_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said(capsys, *words, code=2)
    assert sentence in message
    assert "Traceback" not in message


def test_errors_of_workers_keep_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    from ray.exceptions import RayTaskError

    wrapped = RayTaskError("f", "Traceback of the worker", UserError("the folder is empty: fill it"))
    assert _failed(wrapped.as_instanceof_cause()) == 2
    assert capsys.readouterr().err == "Error: the folder is empty: fill it\n"
    training = RuntimeError("a worker failed")
    training.worker_failures = {1: wrapped}  # type: ignore[attr-defined] # as Ray Train's WorkerGroupError has it
    assert _failed(training) == 2
    capsys.readouterr()
    assert _failed(TooManyRejects(6, 10, "out/rejects")) == 3
    assert "6 of 10 inputs were rejected (60.0%)" in capsys.readouterr().err
    assert _failed(ZeroDivisionError("a bug")) == 1
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_recipes_are_listed_shown_copied_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = said(capsys, "config", "list")
    assert all(name in listed for name in ("demo", "smoke", "emoji", "raymuse train NAME:superres"))
    assert yaml.safe_load(said(capsys, "config", "show", "smoke", "base.steps=7"))["base"]["steps"] == 7
    assert "# required" in said(capsys, "config", "show", "train-base")
    for recipe, stage in (("smoke", "flow"), ("demo:pretokenize", "pretokenize")):
        path = tmp_path / f"{stage}.yaml"
        assert said(capsys, "config", "copy", recipe, str(path)).strip() == str(path)
        assert load(str(path)) == load(recipe)
        assert f"is a config of {stage}" in said(capsys, "config", "check", str(path))
        assert "exists already" in said(capsys, "config", "copy", recipe, str(path), code=2)
    assert "name it something.yaml" in said(capsys, "config", "copy", "demo", str(tmp_path / "it"), code=2)


def test_dry_runs_print_a_plan_and_start_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = said(capsys, "demo", "--recipe", "smoke", "--dry-run", "base.steps=30", "workdir=/w")
    assert "train-base      -> /w/base  30 steps x 8 = 240 samples" in plan
    shards = tiny.write_shards(tmp_path / "shards")
    plan = said(capsys, "train", "demo:vqgan", "--dry-run", "steps=10", f"input={shards}", f"output={tmp_path / 'out'}")
    assert "10 steps of 32 on 2 workers" in plan
    assert " parameters, " in plan
    assert not (tmp_path / "out").exists()
    assert "no such file or folder" in said(capsys, "train", "demo:vqgan", "--dry-run", "workdir=/nowhere", code=2)


def test_cluster_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aws = ROOT / "cluster" / "aws.yaml"
    assert said(capsys, "cluster", "check", str(aws)).startswith("OK: ")
    bad = tmp_path / "bad.yaml"
    bad.write_text(aws.read_text().replace("upscaling_speed", "upscaling_sped"))
    assert "upscaling_sped: no such key; did you mean upscaling_speed?" in said(
        capsys, "cluster", "check", str(bad), code=2
    )


def test_the_first_word_is_a_recipe_a_folder_or_an_override(tmp_path: Path) -> None:
    assert split(["demo:base", "a=1"]) == ("demo:base", ["a=1"])
    assert split(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split(None) == (None, [])
    assert is_data(str(tmp_path))
    assert is_data("s3://bucket/pictures")
    assert is_data("./missing")
    assert not is_data("demo:data")
    assert not is_data("mine/data.yaml")
    assert not is_data("mine/flow.yaml:data")


def test_config_errors_are_counted() -> None:
    assert str(ConfigError("x.yaml", ["a: b"])) == "x.yaml: 1 problem\n  - a: b"
    assert "2 problems" in str(ConfigError("x.yaml", ["a", "b"]))


def test_sigterm_ends_a_stage_with_143_and_leaves_no_process(tmp_path: Path) -> None:
    output = tmp_path / "data"
    words = ["data", "shapes", f"output={output}", "train=200000", "pictures_per_shard=50", "resolution=32"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "raymuse.cli", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 60
    while not list(output.glob("train/*.tar")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 143, message
    assert "stopped by SIGTERM" in message
    assert "the same command goes on from there" in message
    assert [child for child in children if child.is_running()] == []
