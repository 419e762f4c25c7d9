"""Placing a training: the same loop in this process, or in Ray Train's workers.

output/step-00000200/   checkpoints; the newest whole one is where a restart goes on
output/model/           the trained model (the moving average, where there is one)
output/_SUCCESS         last
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raymuse.config.errors import UserError
from raymuse.config.stages import STAGES
from raymuse.config.training import CriticConfig, GeneratorConfig, MaskedConfig, SuperresConfig, TrainConfig
from raymuse.drawing.model_folder import trained_part
from raymuse.models.weights import weights_sha256
from raymuse.storage.folder import Folder
from raymuse.storage.images import list_shards
from raymuse.storage.manifest import Manifest
from raymuse.storage.tokens import TokenStore
from raymuse.tracking.run import Run
from raymuse.training.build import build_task, train_here


def train(config: TrainConfig, run: Run) -> str:
    """Train one model to the end and return its `model` folder. Needs Ray where `workers` > 0.

    Raises:
        UserError: for input that is missing or unfinished, a recipe that does not fit it, or another run's output.
    """
    Folder(config.output).require_local("each worker writes its share of a checkpoint there")
    manifest = Manifest.open(config.output, {**config.identity(), "data": data_fingerprint(config)})
    model = f"{config.output}/model"
    if manifest.finished:
        manifest.release()
        return model
    build_task(config)  # every mistake of the recipe shows here, before any worker starts
    run.params(config.model_dump(mode="json"))
    if config.workers == 0:
        train_here(config, run, lambda metrics, folder: None, print)
    else:
        _train_on_ray(config, run)
    manifest.finish(model=model)
    return model


def data_fingerprint(config: TrainConfig) -> str:
    """What the training reads, by content where the input says it, else by the names of its shards."""
    if isinstance(config, MaskedConfig):
        frozen = {"text_encoder": config.text_encoder}
        if isinstance(config, GeneratorConfig):
            frozen["superres" if isinstance(config, SuperresConfig) else "transformer"] = config.start_from
        elif isinstance(config, CriticConfig):
            frozen["transformer"] = str(trained_part(config.base, "transformer"))
        sums = [weights_sha256(address, part) for part, address in frozen.items() if address is not None]
        return " ".join([TokenStore(config.input).fingerprint, *sums])
    address = str(getattr(config, "input", ""))
    return " ".join(shard.name for shard in list_shards(address))


def _train_on_ray(config: TrainConfig, run: Run) -> None:
    progress, refused = Path(config.output) / "progress.log", Path(config.output) / "refused.txt"
    refused.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run": run,
            "progress": str(progress.resolve()),
            "refused": str(refused.resolve()),
        },
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=RunConfig(
            # A name of its own for every attempt: what a restart goes on from is our checkpoint, not Ray's state.
            name=f"attempt-{int(time.time())}",
            storage_path=str((Path(config.output) / "ray").resolve()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    # Ray Train would answer Ctrl-C itself, end the process with 1, and keep its handler after the training.
    trainer._register_sigint_handler = lambda controller: None
    with _following(progress):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError:
            if not refused.exists():
                raise
    if refused.exists():
        raise UserError(refused.read_text())


def _worker(payload: dict[str, Any]) -> None:
    """One rank, inside Ray Train's process group.

    What only a person can mend is told in a file, and ends the rank well: Ray would start a failed one again.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, int(payload["config"]["cpus_per_worker"])))
    config = STAGES[payload["config"]["stage"]].model_validate(payload["config"])
    assert isinstance(config, TrainConfig)
    with Path(payload["progress"]).open("a", buffering=1) as lines:
        try:
            train_here(config, payload["run"], _report, partial(print, file=lines))
        except UserError as error:
            Path(payload["refused"]).write_text(str(error))


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
