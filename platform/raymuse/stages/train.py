"""Placing a training: the same loop in this process, or in Ray Train's workers.

output/step-00000200/   checkpoints; the newest whole one is where a restart goes on
output/model/           the trained model (the moving average, where there is one)
output/_SUCCESS         last
"""

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback

from raymuse.clusters.placement import place
from raymuse.clusters.watching import watching
from raymuse.config.errors import UserError
from raymuse.config.nodes import NetworkConfig
from raymuse.config.stages import STAGES
from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.tracking.machine import monitored
from raymuse.tracking.run import Run
from raymuse.training.alone import opened, train_alone
from raymuse.training.build import train_here
from raymuse.training.lineage import lineage_params
from raymuse.training.network import missing_interface
from raymuse.training.stopping import Stopped, listening, woken
from raymuse.training.streamed import Pieces
from raymuse.training.surveying import HERE, Surveyor

RESIZE_SECONDS = 30
"""How often an elastic training looks whether the cluster has room for more workers: each change is a restart."""
STARTS = 3  # of a group whose machines are not ready


def train(config: TrainConfig, run: Run) -> str:
    """Train one model to the end and return its `model` folder. Needs Ray where `workers` > 0.

    Raises:
        UserError: for input that is missing or unfinished, a recipe that does not fit it, or another run's output.
        SystemExit, KeyboardInterrupt: stopped by SIGTERM or Ctrl-C; what was done is kept.
    """
    if config.workers == 0:
        return train_alone(config, run, opened(config))
    manifest = opened(config, _surveyor(config))
    model = f"{config.output}/model"
    if manifest.finished:
        manifest.release()
        return model
    run.params({**config.model_dump(mode="json"), **lineage_params(config)})
    stopped = _train_on_ray(config, run)
    manifest.finish(model=model)
    if stopped():  # too late to stop the training, but not what follows it
        raise stopped.raised()
    return model


@dataclass(frozen=True)
class _Notes:
    """Files in the output by which driver and workers tell each other what Ray carries no message for."""

    progress: Path
    refused: Path
    stop: Path

    @classmethod
    def of(cls, config: TrainConfig) -> "_Notes":
        output = Path(config.output).resolve()
        return cls(output / "progress.log", output / "refused.txt", output / "stop")


def _train_on_ray(config: TrainConfig, run: Run) -> Stopped:
    """Train to the end, in as many groups of workers as it takes.

    A group that is told to leave (a node drains, or a worker gets SIGTERM) commits a checkpoint and ends well, so
    that `max_failures` is for failures; the next group goes on where Ray finds room. After SIGTERM to this process, or
    where somebody made the file `stop`, there is none.
    """
    notes = _Notes.of(config)
    for old in (notes.refused, notes.stop):
        old.unlink(missing_ok=True)
    with _following(notes.progress), listening(notes.stop.touch) as stopped, _notice(stopped, config.notice):
        try:
            while not _group(config, run, notes):
                if notes.stop.exists():
                    raise stopped.raised()
        finally:
            notes.stop.unlink(missing_ok=True)
    return stopped


def _group(config: TrainConfig, run: Run, notes: _Notes) -> bool:
    """Start workers and wait for them; whether the training is at its end."""
    for left in reversed(range(STARTS)):
        try:
            ended = _trainer(config, run, notes).fit().return_value
            break
        except ray.train.TrainingFailedError as error:
            if notes.refused.exists():
                break
            # Two of a job's actors that come to a new machine at once may undo each other's copy of its folder.
            if left == 0 or "Failed to set up runtime environment" not in str(error):
                raise
            print("a machine could not prepare the job's folder: the workers start again", flush=True)
    if notes.refused.exists():
        raise UserError(notes.refused.read_text())
    return bool(ended)


def _trainer(config: TrainConfig, run: Run, notes: _Notes) -> TorchTrainer:
    gpu = {"GPU": 1} if config.use_gpu else {}
    workers = config.workers if config.min_workers is None else (config.min_workers, config.workers)
    trainer = _Trainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run": run,
            "notes": notes,
            "host": socket.gethostname(),
            "here": os.getcwd(),
        },
        torch_config=_TorchWithStop(network=config.network, refused=notes.refused),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **gpu, **config.resources},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            label_selector=place("train", gpus=1 if config.use_gpu else 0) or None,
        ),
        run_config=RunConfig(
            # A name of its own for every attempt: what a restart goes on from is our checkpoint, not Ray's state.
            name=f"attempt-{time.time_ns() // 1_000_000}",
            storage_path=str((Path(config.output) / "ray").resolve()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": variables} if (variables := config.network.environment()) else None,
        ),
    )
    # Ray Train would answer Ctrl-C itself, end the process with 1, and keep its handler after the training.
    trainer._register_sigint_handler = lambda controller: None
    return trainer


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's, without the process a group that deals Ray Data's data sets out: it is given none."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]


@contextmanager
def _notice(stopped: Stopped, seconds: float) -> Iterator[None]:
    """Inside, a training that was told to stop is ended after so many seconds, whatever its workers do."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if stopped():
                if not over.wait(seconds):
                    os.kill(os.getpid(), stopped.by or signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


_asked_here = threading.Event()
_kept = ExitStack()  # until the worker ends


class _BackendWithStop(_TorchBackend):  # type: ignore[misc]
    """Ray Train's, whose workers take SIGTERM as a request to stop; Ray's own handler would end them at once."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the process group, where every worker has the network for it. Raises UserError, told in a file too."""
        wrong = {problem for problem in worker_group.execute(missing_interface, backend_config.network) if problem}
        if wrong:
            backend_config.refused.write_text(" ".join(sorted(wrong)))
            raise UserError(backend_config.refused.read_text())
        super().on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(_keep_sigterm)


@dataclass
class _TorchWithStop(TorchConfig):  # type: ignore[misc]
    network: NetworkConfig = field(default_factory=NetworkConfig)
    refused: Path = Path("refused.txt")

    @property
    def backend_cls(self) -> type[_BackendWithStop]:
        return _BackendWithStop


def _keep_sigterm() -> None:
    """In the worker's main thread; the training runs in another, where no handler can be set."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    _kept.enter_context(woken(lambda number: _asked_here.set() if number == signal.SIGTERM else None))


def _asked(notes: _Notes) -> bool:
    """Whether this worker was told to stop: by SIGTERM, by its driver, or since a node of the training drains.

    `ray.train.get_preemption_info` would wait for all workers at every step; the loop itself tells them of each other.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    draining = get_train_context().preemption_context.preemption_info is not None
    return _asked_here.is_set() or draining or notes.stop.exists()


def _worker(payload: dict[str, Any]) -> bool:
    """One rank, inside Ray Train's process group; whether the training is at its end.

    What only a person can mend is told in a file, and a rank that finds the file ends well: Ray would start a failed
    one again. One of several fails first, since the others may wait for it.
    """
    if Path(payload["here"]).is_dir():
        os.chdir(payload["here"])  # relative addresses are the driver's
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, int(payload["config"]["cpus_per_worker"])))
    config = STAGES[payload["config"]["stage"]].model_validate(payload["config"])
    assert isinstance(config, TrainConfig)
    notes: _Notes = payload["notes"]
    if notes.refused.exists():
        return False
    meter = watching(config.stage, config.steps, config.batch_size, pays=False)  # type: ignore[attr-defined]
    with notes.progress.open("a", buffering=1) as lines, meter, _machine(payload["run"], payload["host"]):
        try:
            say = partial(print, file=lines)
            return train_here(config, payload["run"], _report, say, partial(_asked, notes), _pieces(config))
        except UserError as error:
            notes.refused.write_text(str(error))
            if ray.train.get_context().get_world_size() > 1:
                raise
            return False


def _streams(config: TrainConfig) -> TypeGuard[MaskedConfig]:
    """Whether a training encodes as it runs."""
    return isinstance(config, MaskedConfig) and config.stream is not None


def _surveyor(config: TrainConfig) -> Surveyor:
    """Who looks through the pictures before they are encoded: the cluster."""
    if not _streams(config):
        return HERE
    from raymuse.tokenizing.feed import surveyor  # Ray Data, which no other training needs

    return surveyor(config)


def _pieces(config: TrainConfig) -> Pieces | None:
    """Where a worker of a training that encodes as it runs gets its rows from."""
    if not _streams(config):
        return None
    from raymuse.tokenizing.feed import feed

    return feed(config)


@contextmanager
def _machine(run: Run, driver: str) -> Iterator[None]:
    """Inside, the run is told how busy this machine is, by one of its workers; the driver tells of its own machine."""
    here = socket.gethostname()
    if here == driver or ray.train.get_context().get_local_rank() > 0:
        yield
        return
    with monitored(run, node=here):
        yield


@contextmanager
def _following(progress: Path) -> Iterator[None]:
    """Inside, print here what rank 0 writes to its progress file."""
    seen = progress.stat().st_size if progress.exists() else 0
    done = threading.Event()

    def follow() -> None:
        place = seen
        while True:
            last = done.wait(0.5)
            if progress.exists():
                with progress.open() as lines:
                    lines.seek(place)
                    text = lines.read()
                    place = lines.tell()
                print(text, end="", flush=True)
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)


def _report(metrics: dict[str, float], folder: Path | None) -> None:
    """Hand Ray Train a pointer to the committed checkpoint, which stays where it is. Collective."""
    if folder is None or ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "pointer.json").write_text(json.dumps({"checkpoint": str(folder.resolve())}))
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(scratch))
