"""Training on Ray Train with DeepSpeed ZeRO: a worker killed in the middle changes no bit of the result."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

import tiny
from processes import children_named, wait_until
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.training import BaseConfig
from raymuse.drawing.model_folder import load_base
from raymuse.stages.train import train
from raymuse.storage import checkpoint
from raymuse.tracking.run import Run
from raymuse.training.build import train_here

STEPS, EVERY = 12, 4


def config_of(folder: Path, tokens: str) -> BaseConfig:
    """Two workers, ZeRO-2, a checkpoint every fourth step, and one lost worker allowed."""
    options = {"workers": 2, "zero": {"stage": 2}, "max_failures": 1, "log_every": EVERY, "ema_decay": 0.9}
    kept = {"every": EVERY, "keep": STEPS // EVERY}
    return tiny.base_config(folder, tokens, steps=STEPS, checkpoint=kept, **options)


@pytest.fixture(scope="module")
def undisturbed(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """The training in two processes of our own, without Ray: what `torchrun` would start."""
    config = config_of(tmp_path_factory.mktemp("undisturbed"), tokens)
    run_ranks(train_rank, 2, tmp_path_factory.mktemp("ranks"), config)
    return config


def train_rank(config: BaseConfig) -> None:
    train_here(config, Run.off(), lambda metrics, folder: None, lambda line: None)


@pytest.fixture(scope="module")
def disturbed(ray_cluster: Cluster, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """The same training, of whose workers one was killed right after the first checkpoint."""
    config = config_of(tmp_path_factory.mktemp("disturbed"), tokens)
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(Path(config.output), killed), daemon=True)
    killer.start()
    train(config, Run.off())
    killer.join()
    assert len(killed) == 1
    return config


def _kill_a_worker(output: Path, killed: list[int]) -> None:
    first = output / f"step-{EVERY:08d}" / "checkpoint.json"
    wait_until(lambda: len(children_named("RayTrainWorker")) == 2, 100)
    workers = children_named("RayTrainWorker")
    wait_until(first.exists, 100)
    workers[-1].kill()
    killed.append(workers[-1].pid)


def test_a_killed_worker_changes_no_bit_of_the_weights(undisturbed: BaseConfig, disturbed: BaseConfig) -> None:
    for name in ("model", "model_raw"):
        one, other = (
            Path(config.output, name, "diffusion_pytorch_model.safetensors").read_bytes()
            for config in (undisturbed, disturbed)
        )
        assert one == other, name
    found = [checkpoint.newest(Path(config.output)) for config in (undisturbed, disturbed)]
    assert [one.step for one in found if one] == [STEPS, STEPS]
    ends = [one.tensors() for one in found if one]
    assert ends[0].keys() == ends[1].keys()
    assert {name.split("/")[0] for name in ends[0]} == {"weight", "ema", "exp_avg", "exp_avg_sq"}
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_the_training_went_on_from_a_checkpoint_and_not_from_the_start(disturbed: BaseConfig) -> None:
    lines = Path(disturbed.output, "progress.log").read_text()
    assert lines.count("going on from step") == 1
    step = int(lines.split("going on from step ")[1].split()[0])
    assert 0 < step < STEPS
    after = lines.split("going on from step")[1]
    assert f"step {STEPS}/{STEPS}" in after
    assert f"step {EVERY}/{STEPS}" not in after, "it began again"


def test_ray_train_holds_a_pointer_to_our_checkpoint(disturbed: BaseConfig) -> None:
    pointers = sorted(Path(disturbed.output, "ray").rglob("pointer.json"))
    named = {Path(json.loads(pointer.read_text())["checkpoint"]) for pointer in pointers}
    assert Path(disturbed.output).resolve() / f"step-{STEPS:08d}" in named
    assert all((folder / "checkpoint.json").exists() for folder in named)
    heaviest = max(path.stat().st_size for path in Path(disturbed.output, "ray").rglob("*") if path.is_file())
    assert heaviest < 100_000, "Ray keeps no weights"


def test_each_rank_wrote_its_share_and_no_pickle(disturbed: BaseConfig) -> None:
    root = Path(disturbed.output)
    ours = [path for path in root.rglob("*") if path.is_file() and "ray" not in path.relative_to(root).parts]
    assert {path.suffix for path in ours} <= {".safetensors", ".json", ".log", ""}
    heads = {path: path.read_bytes()[:2] for path in ours}
    assert not [path for path, head in heads.items() if head[:1] == b"\x80" or head == b"PK"]
    shares = [load_file(root / f"step-{STEPS:08d}" / f"rank-0000{rank}.safetensors") for rank in range(2)]
    assert all(shares)
    assert not set(shares[0]) & set(shares[1])


def test_the_trained_model_opens_and_a_second_run_starts_no_worker(disturbed: BaseConfig) -> None:
    load_base(Path(disturbed.output) / "model")
    attempts = sorted(Path(disturbed.output, "ray").iterdir())
    began = time.perf_counter()
    assert train(disturbed, Run.off()) == f"{disturbed.output}/model"
    assert time.perf_counter() - began < 2
    assert sorted(Path(disturbed.output, "ray").iterdir()) == attempts


def test_other_hyperparameters_on_the_same_output_are_refused(disturbed: BaseConfig) -> None:
    other = BaseConfig.model_validate({**disturbed.model_dump(), "batch_size": 16})
    with pytest.raises(UserError, match="batch_size was 8 and is now 16"):
        train(other, Run.off())


def test_what_only_a_person_can_mend_is_told_once_and_not_tried_again(disturbed: BaseConfig, tmp_path: Path) -> None:
    """A worker finds a checkpoint of another optimizer: no other attempt would read it either."""
    muon = {**disturbed.optimizer.model_dump(), "name": "muon"}
    values = {"output": str(tmp_path / "muon"), "workers": 1, "max_failures": 3, "optimizer": muon}
    config = BaseConfig.model_validate({**disturbed.model_dump(), **values})
    shutil.copytree(f"{disturbed.output}/step-{STEPS:08d}", tmp_path / "muon" / f"step-{STEPS:08d}")
    with pytest.raises(UserError, match="another optimizer wrote it"):
        train(config, Run.off())
    assert (tmp_path / "muon" / "progress.log").read_text() == ""
