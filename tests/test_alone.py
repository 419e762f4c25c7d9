"""Trainings without Ray: stopped in this process, gone on with under torchrun; killed while a checkpoint is written."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from processes import wait_until
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import from_values
from raymuse.config.training import BaseConfig, OptimizerConfig
from raymuse.storage import checkpoint
from raymuse.tracking.run import Run
from raymuse.training.alone import main, opened, train_alone
from raymuse.training.optimizers import build_optimizer
from trainings import fit

STEPS, EVERY = 40, 10

# A disk on which the second checkpoint takes for ever.
SLOW_DISK = """
import sys, time
from raymuse.config.training import BaseConfig
from raymuse.storage import checkpoint
from raymuse.tracking.run import Run
from raymuse.training.alone import opened, train_alone

def save_slowly(tensors, path):
    save(tensors, path)
    if "step-00000020" in str(path):
        path.write_bytes(path.read_bytes()[:1000])
        time.sleep(3600)

save, checkpoint.save_file = checkpoint.save_file, save_slowly
config = BaseConfig.model_validate_json(sys.argv[1])
train_alone(config, Run.off(), opened(config))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    return tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root / "encoders", shards))


def config_of(root: Path, data: str, **changes: Any) -> BaseConfig:
    values = {"steps": STEPS, "log_every": 5, "ema_decay": 0.9, "checkpoint": {"every": EVERY, "keep": 5}}
    return tiny.base_config(root, data, **{**values, **changes})


@pytest.fixture(scope="module")
def straight(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """All that the last checkpoint of an undisturbed training holds."""
    return fit(config_of(tmp_path_factory.mktemp("straight"), data))[1]


@pytest.fixture(scope="module")
def stopped(data: str, tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """The same, with a trace, told to stop after its first checkpoint, at a step where none is due."""
    for _ in range(4):
        config = told_to_stop(config_of(tmp_path_factory.mktemp("stopped"), data, profile=True))
        kept = checkpoint.newest(Path(config.output))
        if kept is None or kept.step % EVERY:  # one that was due would prove nothing
            break
    return config


def told_to_stop(config: BaseConfig) -> BaseConfig:
    first = checkpoint.folder_of(Path(config.output), EVERY) / "checkpoint.json"

    def tell() -> None:
        wait_until(first.exists, 300)
        os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread(), "who else would get the signal?"
    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        train_alone(config, Run.off(), opened(config))
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    return config


def test_sigterm_keeps_the_very_step_it_came_in(stopped: BaseConfig) -> None:
    kept = checkpoint.newest(Path(stopped.output))
    assert kept is not None
    assert EVERY < kept.step < STEPS
    assert kept.step % EVERY, "a checkpoint that was due would prove nothing"


def test_a_profile_has_the_steps_of_the_model(stopped: BaseConfig) -> None:
    trace = json.loads(Path(stopped.output, "profile", "rank-00000.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert {"aten::addmm", "aten::layer_norm"} & names
    assert any(name.startswith("ProfilerStep#") for name in names)


def test_torchrun_goes_on_where_one_process_stopped(
    stopped: BaseConfig, straight: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    """Two ranks with DeepSpeed at ZeRO 2: the weights of a training in one process, to rounding."""
    recipe = tmp_path / "my.yaml"
    recipe.write_text(yaml.safe_dump(json.loads(stopped.model_dump_json())))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    outside = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nowhere"}
    done = subprocess.run(
        [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "raymuse.training", str(recipe)],
        capture_output=True,
        text=True,
        env=outside,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from step") == 1
    found = checkpoint.newest(Path(stopped.output))
    assert found is not None
    assert (found.step, len(found.files)) == (STEPS, 2)
    assert found.tensors().keys() == straight.keys()
    worst = max(float((value - straight[name]).abs().max()) for name, value in found.tensors().items())
    assert worst < 1e-3
    assert Path(stopped.output, "_SUCCESS").exists()


def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_alone(
    data: str, straight: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    """The steps go on while it is written; the half file counts for nothing; the result is the same bits."""
    config = config_of(tmp_path, data, log_every=1)
    log = tmp_path / "log"
    with log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_DISK, config.model_dump_json()],
            stdout=lines,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
    try:
        wait_until(lambda: f"step 25/{STEPS}" in log.read_text() or process.poll() is not None, 300)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    half = checkpoint.folder_of(Path(config.output), 20)
    assert [path.stat().st_size for path in half.iterdir()] == [1000]
    losses, tensors = fit(config)
    assert len(losses) == STEPS - EVERY
    assert all(tensors[name].equal(value) for name, value in straight.items())


def test_a_checkpoint_says_the_mean_loss_since_the_one_before(data: str, tmp_path: Path) -> None:
    """What `keep_best` goes by where nothing is held out."""
    config = config_of(tmp_path, data, steps=10, log_every=1, checkpoint={"every": 4, "keep": 1, "keep_best": True})
    losses = fit(config)[0]
    said = {}
    for path in Path(config.output).glob("step-*/checkpoint.json"):
        record = json.loads(path.read_text())
        said[record["step"]] = (record["state"]["steps"], record["state"]["loss"])
    means = {step: sum(losses[step - count : step]) / count for step, count in {4: 4, 8: 4, 10: 2}.items()}
    kept = {10, min(means, key=lambda step: means[step])}
    assert said.keys() == kept
    for step, (count, loss) in said.items():
        assert loss == pytest.approx(means[step], abs=1e-6), (step, count)


def test_torchrun_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 2
    assert main(["demo:bse"]) == 2
    assert "Did you mean demo:base" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adafactor", "adamw-8bit"])
def test_optimizers_that_need_whole_parameters_are_refused_where_those_are_cut(name: str) -> None:
    values = {"input": "x", "output": "y", "steps": 1, "optimizer": {"name": name}}
    with pytest.raises(ConfigError, match=rf"optimizer.name: {name} needs zero.stage: 0 \(it is 2\)"):
        from_values("train-base", values)
    for fitting in ({"zero": {"stage": 0}}, {"workers": 0}):
        from_values("train-base", {**values, **fitting})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero": {"stage": 3, "offload": True}}, r"needs stage 1 or 2, .* \(it is 3\)"),
        ({"zero": {"offload": True}, "workers": 0}, "workers: 0 trains without DeepSpeed"),
    ],
)
def test_offloading_where_nothing_can_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_values("train-base", {"input": "x", "output": "y", "steps": 1, **changes})


def test_8_bit_adam_trains_or_says_what_it_needs() -> None:
    model, config = torch.nn.Linear(64, 64), OptimizerConfig(name="adamw-8bit")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="adamw-8bit needs bitsandbytes, which does not load"):
            build_optimizer(model, config)
    else:
        assert type(build_optimizer(model, config)).__name__ == "AdamW8bit"


def test_a_range_of_workers(data: str, tmp_path: Path) -> None:
    values = {"input": data, "output": str(tmp_path), "steps": 1}
    elastic = from_values("train-base", values, ["workers={min: 1, max: 3}"])
    assert isinstance(elastic, BaseConfig)
    assert (elastic.workers, elastic.min_workers) == (3, 1)
    for wrong, said in {
        "{min: 4, max: 3}": "4 is more than workers, 3",
        "{most: 3}": "a range has min and max",
    }.items():
        with pytest.raises(ConfigError, match=said):
            from_values("train-base", values, [f"workers={wrong}"])
