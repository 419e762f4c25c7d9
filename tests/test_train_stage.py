"""Training on Ray Train with DeepSpeed ZeRO: workers killed and told to leave change no bit of the result."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from safetensors.torch import load_file

import tiny
from processes import children_named, wait_until
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.nodes import NetworkConfig
from raymuse.config.training import BaseConfig
from raymuse.drawing.model_folder import load_base
from raymuse.stages.train import _group, _Notes, _notice, _TorchWithStop, _trainer, train
from raymuse.storage import checkpoint
from raymuse.tracking.run import Run
from raymuse.training.build import train_here
from raymuse.training.stopping import listening

STEPS, EVERY = 24, 4
NETWORK = {"interface": "lo", "variables": {"NCCL_DEBUG": "WARN"}}


def config_of(folder: Path, tokens: str, **more: Any) -> BaseConfig:
    """Two workers, ZeRO-2, a checkpoint every fourth step, and one lost worker allowed."""
    options = {"workers": 2, "zero": {"stage": 2}, "max_failures": 1, "log_every": EVERY, "ema_decay": 0.9}
    kept = {"every": EVERY, "keep": STEPS}
    return tiny.base_config(folder, tokens, steps=STEPS, checkpoint=kept, **options, **more)


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
    """The same training: a worker killed, the next group's told to leave, then the driver told to stop; and again."""
    config = config_of(tmp_path_factory.mktemp("disturbed"), os.path.relpath(tokens), network=NETWORK)  # as people type
    assert threading.current_thread() is threading.main_thread(), "who else would get the signal?"
    before = signal.getsignal(signal.SIGTERM)
    sent: list[str] = []
    environments: list[dict[str, str]] = []  # with which the workers' processes began
    storm = threading.Thread(target=_storm, args=(Path(config.output), sent, environments), daemon=True)
    storm.start()
    with pytest.raises(SystemExit) as stopped:
        train(config, Run.off())
    storm.join()
    assert (stopped.value.code, sent) == (143, ["kill a worker", "tell a worker", "tell the driver"])
    told = {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}
    assert [environment.items() >= told.items() for environment in environments] == [True] * 6
    assert signal.getsignal(signal.SIGTERM) == before
    assert not Path(config.output, "_SUCCESS").exists()
    train(config, Run.off())
    return config


def _storm(output: Path, sent: list[str], environments: list[dict[str, str]]) -> None:
    """To three groups of workers in turn, each as soon as it has committed something."""
    known: set[int] = set()
    for deed in ("kill a worker", "tell a worker", "tell the driver"):
        wait_until(lambda: len(_new_workers(known)) == 2, 300, pause=0.1)  # it looks at every process
        workers = _new_workers(known)
        environments.extend(worker.environ() for worker in workers)
        committed = len(list(output.glob("step-*/checkpoint.json")))  # the group before has ended by now
        wait_until(lambda: len(list(output.glob("step-*/checkpoint.json"))) > committed, 300)  # noqa: B023
        if deed == "kill a worker":
            workers[-1].kill()
        elif deed == "tell a worker":
            workers[-1].terminate()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        sent.append(deed)
        known.update(worker.pid for worker in workers)


def _new_workers(known: set[int]) -> list[psutil.Process]:
    return [worker for worker in children_named("RayTrainWorker") if worker.pid not in known]


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


def test_the_training_went_on_from_its_checkpoints_and_never_from_the_start(disturbed: BaseConfig) -> None:
    """Whoever was told to stop kept the very step; only the kill cost steps, and only it counted as a failure."""
    lines = Path(disturbed.output, "progress.log").read_text().splitlines()
    resumed = [int(line.split()[4]) for line in lines if line.startswith("going on from step")]
    kept = [int(line.split()[4]) for line in lines if line.startswith("asked to stop")]
    assert len(resumed) == 3
    assert resumed[0] % EVERY == 0 < resumed[0]
    assert resumed[1:] == kept
    assert resumed[0] < kept[0] < kept[1] < STEPS
    assert lines[-1].startswith(f"step {STEPS}/{STEPS}")


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


def test_an_interface_that_a_worker_lacks_is_told_before_a_process_group_starts(tmp_path: Path) -> None:
    """That the driver hears what is refused, the test above shows of a real group."""

    class Group:
        def execute(self, work: Callable[..., object], *arguments: object) -> list[object]:
            return [work(*arguments)]

    asked = _TorchWithStop(network=NetworkConfig(interface="nosuch0"), refused=tmp_path / "refused.txt")
    with pytest.raises(UserError, match=r"nosuch0 is none of this machine's \(.*lo.*\)\. Name one that every"):
        asked.backend_cls().on_start(Group(), asked)
    assert "nosuch0" in asked.refused.read_text()


def test_a_machine_that_is_not_ready_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors are Ray's own, as it words them; the race that leads to them cannot be brought about."""
    unprepared = ray.train.ControllerError(ray.exceptions.RuntimeEnvSetupError("no such folder"))
    errors: list[Exception] = [unprepared, unprepared]

    class Trainer:
        return_value = True

        def fit(self) -> "Trainer":
            if errors:
                raise errors.pop()
            return self

    monkeypatch.setattr("raymuse.stages.train._trainer", lambda *_: Trainer())
    config = tiny.base_config(tmp_path, "nowhere")
    assert _group(config, Run.off(), _Notes.of(config))
    for given in ([unprepared] * 3, [ray.train.ControllerError(ValueError("another"))]):
        errors += given
        with pytest.raises(ray.train.ControllerError):
            _group(config, Run.off(), _Notes.of(config))


@pytest.mark.usefixtures("ray_cluster")
def test_no_process_deals_out_data_sets_that_there_are_not(tmp_path: Path) -> None:
    config = tiny.base_config(tmp_path, "nowhere", workers=1)
    ours = _trainer(config, Run.off(), _Notes.of(config))
    kinds = [type(one) for one in ours._create_default_callbacks()]
    assert [type(one) for one in TorchTrainer._create_default_callbacks(ours) if type(one) not in kinds] == [
        DatasetsCallback
    ]


def test_a_training_that_does_not_stop_within_its_notice_is_ended() -> None:
    began = time.perf_counter()

    def deaf() -> None:
        with listening() as stopped, _notice(stopped, 0.3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    with pytest.raises(SystemExit) as ended:
        deaf()
    assert ended.value.code == 143
    assert 0.3 < time.perf_counter() - began < 10
