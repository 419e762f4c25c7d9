"""A training without Ray: in this process, or in the ranks that `torchrun` starts.

    torchrun --nproc-per-node 2 -m raymuse.training demo:base zero.stage=3

A recipe and its changes follow `raymuse.training`, as they do `raymuse train`. Checkpoints and output are the same, so
either may go on from the other's.
"""

import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import load
from raymuse.config.stages import STAGES
from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.recording import recorded, run_of
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import Manifest
from raymuse.tracking.run import Run, finishing
from raymuse.training.build import build_task, train_here
from raymuse.training.engine import rank_and_world
from raymuse.training.fitting import require_shown
from raymuse.training.inputs import data_fingerprint
from raymuse.training.lineage import lineage_params
from raymuse.training.network import missing_interface
from raymuse.training.saving import agreed
from raymuse.training.stopping import listening
from raymuse.training.surveying import HERE, Surveyor, prepare


def train_alone(config: TrainConfig, run: Run, manifest: Manifest | None) -> str:
    """Train one model to the end in this process and return its `model` folder; or this rank's part of it. Collective.

    Args:
        manifest: of the output, as `opened` gives it, on rank 0; None on the others.

    Raises:
        SystemExit, KeyboardInterrupt: stopped by SIGTERM or Ctrl-C; what was done is kept.
    """
    model = f"{config.output}/model"
    if agreed(manifest is not None and manifest.finished):
        if manifest is not None:
            manifest.release()
        return model
    if manifest is not None:
        run.params({**config.model_dump(mode="json"), **lineage_params(config)})
    with listening() as stopped:
        ended = train_here(config, run, lambda metrics, folder: None, _say, stopped)
    if ended and manifest is not None:
        manifest.finish(model=model)
    if stopped() or not ended:
        raise stopped.raised()
    return model


def opened(config: TrainConfig, surveyor: Surveyor = HERE) -> Manifest:
    """The output's manifest, with everything checked that can be checked before a worker starts.

    Not within a process group: the other ranks take no part.

    Args:
        surveyor: who looks through the pictures of a config with `stream`.

    Raises:
        UserError: for input that is missing or unfinished, a recipe that does not fit it, or another run's output.
    """
    Folder(config.output).require_local("each worker writes its share of a checkpoint there")
    manifest = Manifest.open(config.output, {**config.identity(), "data": data_fingerprint(config)})
    if not manifest.finished:
        prepare(config, surveyor)
        require_shown(config, build_task(config))  # every mistake of the recipe shows here
    return manifest


def main(words: Sequence[str]) -> int:
    """One rank of `torchrun`: 0 done, 2 bad usage, input or config; stopped, it ends as `raymuse train` does."""
    if not words:
        print("usage: torchrun ... -m raymuse.training RECIPE [KEY=VALUE ...]", file=sys.stderr)
        return 2
    try:
        config = config_of(words[0], words[1:])
        manifest = opened(config) if os.environ.get("RANK", "0") == "0" else None
        _join(config)
        run = _run(config)
        with finishing(run), recorded(config, run):
            train_alone(config, run, manifest)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def config_of(recipe: str, changes: Sequence[str]) -> TrainConfig:
    """The recipe for as many workers as torchrun has started; one for a range of them sums as it does under Ray."""
    stages = {name for name in STAGES if name.startswith("train-")}
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = load(recipe, [*changes, f"workers={world}", "min_workers=null"], stages)
    assert isinstance(config, TrainConfig)
    if isinstance(config, MaskedConfig) and config.exact_rows == "auto":
        try:
            asked = load(recipe, changes, stages)
        except ConfigError:  # it is right for these workers alone, and so for no range of them
            return config
        assert isinstance(asked, MaskedConfig)
        if asked.exact is not None:
            config = config.model_copy(update={"exact_rows": asked.exact, "micro_batch_size": None})
    return config


def _join(config: TrainConfig) -> None:
    """The process group of torchrun's ranks, each on its own GPU where they are wanted."""
    if problem := missing_interface(config.network):
        raise UserError(problem)
    os.environ.update(config.network.environment())
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if config.use_gpu else "cpu")
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, alone)
    if config.use_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    dist.init_process_group("nccl" if config.use_gpu else "gloo")


def _run(config: TrainConfig) -> Run:
    """Rank 0 logs, to MLFLOW_TRACKING_URI; a resume goes on in the same run."""
    if rank_and_world()[0] > 0:
        return Run.off()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or None
    return run_of(config, uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", "raymuse"))


def _say(line: str) -> None:
    print(line, flush=True)
