"""From a config to what trains: task, engine, loop."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from raymuse.config.training import (
    BaseConfig,
    ClipConfig,
    CriticConfig,
    MaskedConfig,
    SuperresConfig,
    TrainConfig,
    VqganConfig,
)
from raymuse.models.precision import multiplies_bf16
from raymuse.tracking.run import Run
from raymuse.training.engine import Engine, PlainEngine, global_sum, rank_and_world
from raymuse.training.loop import Loop, exact_rows, micro_batches
from raymuse.training.profile import tracing
from raymuse.training.saving import Report
from raymuse.training.stopping import Stopping, never
from raymuse.training.task import Task

if TYPE_CHECKING:
    from raymuse.training.streamed import Pieces


def build_task(config: TrainConfig, device: str = "cpu", pieces: "Pieces | None" = None) -> Task:
    """The training that the config describes, its data opened and its network fresh.

    Each imports only what it needs: transformers would cost every worker seconds.

    Args:
        pieces: of a config with `stream`, who encodes; None: this process.
    """
    if isinstance(config, VqganConfig):
        from raymuse.training.vqgan import VqganTask

        return VqganTask(config, device)
    if isinstance(config, ClipConfig):
        from raymuse.training.clip import ClipTask

        return ClipTask(config, device)
    if isinstance(config, CriticConfig):
        from raymuse.training.critic import CriticTask

        return CriticTask(config, device, pieces)
    from raymuse.training.masked import MaskedTask

    assert isinstance(config, BaseConfig | SuperresConfig)
    return MaskedTask(config, device, pieces)


def build_engine(config: TrainConfig, task: Task, device: str = "cpu") -> Engine:
    """DeepSpeed ZeRO for the transformers where workers train together; plain data parallelism otherwise.

    Exact sums need nothing of DeepSpeed's at stage 0, and take its place.
    """
    rows = exact_rows(config)
    pieces = None if rows is None else -(-config.batch_size // rows)
    if isinstance(config, MaskedConfig) and config.workers > 0 and not (pieces and config.zero.stage == 0):
        from raymuse.training.zero import DeepSpeedEngine

        micro, accumulation = micro_batches(config, rank_and_world()[1])
        return DeepSpeedEngine(
            task.module,
            config.optimizer,
            zero_stage=config.zero.stage,
            micro_batch=micro,
            accumulation=accumulation,
            offload=config.zero.offload,
            pieces=pieces,
        )
    return PlainEngine(task.module, config.optimizer, device, pieces)


def train_here(
    config: TrainConfig,
    run: Run,
    report: Report,
    say: Callable[[str], None],
    stopping: Stopping = never,
    pieces: "Pieces | None" = None,
) -> bool:
    """Run this rank's part of the training, in whatever process group it finds; False where it was asked to stop."""
    device = f"cuda:{torch.cuda.current_device()}" if config.use_gpu else "cpu"
    config = _with_number_type(config, torch.device(device).type, say)
    if rows := exact_rows(config):
        if isinstance(config, MaskedConfig) and config.exact_rows == "auto" and rank_and_world()[0] == 0:
            beside = "" if config.budget is None else "; and it stays as long as it is, whatever budget says"
            say(f"exact_rows: {rows} of {config.batch_size}, since the number of workers may change{beside}")
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))  # by which products round; also without Ray
    task = build_task(config, device, pieces)
    engine = build_engine(config, task, device)
    with tracing(config, engine.rank) as next_step:
        return Loop(config, task, engine, run, report, say, stopping, next_step).fit()


def _with_number_type(config: TrainConfig, device_type: str, say: Callable[[str], None]) -> TrainConfig:
    """The config with what `precision: auto` stands for on these workers. Collective.

    Rank 0 says so; and where bf16 was asked for and hardware lacks it, since that is very slow.
    """
    if config.precision not in ("auto", "bf16"):
        return config
    rank, world = rank_and_world()
    able = int(global_sum(torch.tensor([float(multiplies_bf16(device_type))], dtype=torch.float64)))
    lacking = f"{world - able} of {world} workers have no hardware for products in bf16"
    line = None
    if config.precision == "auto":
        config = config.model_copy(update={"precision": "bf16" if able == world else "fp32"})
        line = f"precision: {config.precision}" + (f", since {lacking}" if able < world else "")
    elif able < world:
        line = f"precision: bf16 is emulated, far slower than fp32: {lacking}; auto would take fp32"
    if line is not None and rank == 0:
        say(line)
    return config
