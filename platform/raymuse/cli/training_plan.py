"""What a training would take, in words, for `--dry-run`."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from raymuse.cli.plans import longer
from raymuse.clusters import costs
from raymuse.clusters.prices import Prices, read_prices
from raymuse.config.recipe import stage_of
from raymuse.config.training import MaskedConfig, TrainConfig, VqganConfig
from raymuse.models.precision import multiplies_bf16
from raymuse.training.build import build_task
from raymuse.training.plan import Plan, plan_of
from raymuse.training.task import Task
from raymuse.training.vqgan import VqganTask

GPU = "H200"  # what is planned with, by the table of prices and of shares that stages reach
GIB = 2**30


def train_plan(config: TrainConfig) -> str:
    """Parameters, time, cost, memory by ZeRO stage, disk, and what its machines are told.

    Raises:
        UserError: as the training itself would.
    """
    if config.precision == "auto":
        low = config.use_gpu or multiplies_bf16("cpu")  # GPUs are those of the plan
        config = config.model_copy(update={"precision": "bf16" if low else "fp32"})
    if not isinstance(config, MaskedConfig):
        return _simple_text(config)
    plan = plan_of(config)
    time = _time(config, plan.flops)
    return "\n".join([*_work(plan), *time, *_memory(plan), *_disk(plan), *_nodes(config)]) + "\n"


def _work(plan: Plan) -> list[str]:
    config, sizes = plan.config, plan.sizes
    what = f"{plan.trained:,} parameters" + (f" to train and {plan.still:,} that stay" if plan.still else "")
    stage = stage_of(type(config))
    steps = f"{config.steps:,} steps of {config.batch_size:,} on {config.workers} workers{longer(config)}"
    lines = [f"{stage}: {what}, {steps}"]
    grid = f"grid {sizes.grid[0]} x {sizes.grid[1]}, {sizes.text_tokens} text tokens"
    if plan.rows is None:
        missing = "there are no token shards at" if config.stream is None else "there is no survey yet of"
        lines.append(f"{grid}: by the recipe, since {missing} {config.source}")
    else:
        lines.append(f"{grid}, {plan.rows:,} rows: an epoch is {plan.rows / config.batch_size:,.1f} steps")
    work = plan.flops * config.batch_size
    lines.append(f"work: {_big(plan.flops)}FLOP a sample, {_big(work)}FLOP a step")
    return lines


def _time(config: TrainConfig, flops: float) -> Iterator[str]:
    """Time and cost: on GPUs by an H200's rate and price, else by a core's of the price table."""
    workers, samples, prices = max(1, config.workers), config.steps * config.batch_size, read_prices(None)
    if not config.use_gpu:
        cores = workers * config.cpus_per_worker
        rate = prices.core.tflops * 1e12 * cores / flops
        hours = samples / rate / 3600
        yield (
            f"at a core's {prices.core.tflops:g} TFLOP/s: {rate:,.1f} samples/s on {cores:g} cores; "
            f"{_duration(hours)}, {hours * cores:,.1f} core hours"
        )
        yield _cost(config, hours, hours * cores * prices.pods.cpu, f"{prices.pods.cpu:g} a core hour", prices)
    elif config.precision == "fp32":
        yield "time and cost: not known of fp32 on a GPU; precision=bf16 is planned"
    else:
        share, peak = prices.reached.train, prices.gpus[GPU].tflops
        rate = share * peak * 1e12 / flops
        hours = samples / (rate * workers) / 3600
        yield (
            f"at {share:.0%} of an {GPU}'s {peak:.0f} TFLOP/s (bf16): {rate:,.0f} samples/s a GPU, "
            f"{rate * workers:,.0f} on {workers}; {_duration(hours)}, {hours * workers:,.1f} GPU hours"
        )
        hour = prices.gpus[GPU].hour
        yield _cost(config, hours, hours * workers * hour, f"{hour:g} a GPU hour", prices)


def _cost(config: TrainConfig, hours: float, listed: float, how: str, prices: Prices) -> str:
    """What the machines cost for that long: as `price_per_hour` says, else by the price table of `cluster plan`."""
    if config.price_per_hour:
        return f"cost: {hours * config.price_per_hour:,.2f} at price_per_hour={config.price_per_hour:g}"
    return f"cost: {prices.currency} {listed:,.2f} at {how} (set price_per_hour, or see `raymuse cluster plan`)"


def _nodes(config: TrainConfig) -> Iterator[str]:
    """What the workers' machines are told, where they are told something."""
    if variables := config.network.environment():
        yield "every worker's environment: " + " ".join(f"{name}={value}" for name, value in variables.items())
    if isinstance(config, MaskedConfig) and config.shard_cache is not None:
        cache = config.shard_cache
        yield f"copies of token shards: up to {cache.gib:g} GiB in {cache.folder} of each machine"


def _memory(plan: Plan) -> list[str]:
    config, micro = plan.config, plan.sizes.batch
    kept, again = plan.activations(recompute=False) / GIB, plan.activations(recompute=True) / GIB
    used = again if config.gradient_checkpointing else kept
    chosen = config.zero.stage if config.workers > 0 else 0
    lines = [
        f"activations of {micro} samples in {config.precision}: {kept:.2f} GiB, or {again:.2f} with gradient "
        f"checkpointing ({'on' if config.gradient_checkpointing else 'off'})",
        "GiB a worker   weights  gradients  optimizer, average  buffers     peak",
    ]
    for stage in (0, 1, 2, 3):
        held = plan.memory(stage)
        lines.append(
            f"{'*' if stage == chosen else ' '} ZeRO {stage}      {held.weights / GIB:8.2f}   "
            f"{held.gradients / GIB:8.2f}            {held.state / GIB:8.2f} {held.buffers / GIB:8.2f} "
            f"{held.total(used * GIB) / GIB:8.2f}"
        )
    return lines


def _disk(plan: Plan) -> list[str]:
    config = plan.config
    own = 4 * plan.trained * (2 if config.ema_decay else 1) + plan.moments
    return [_checkpoints(config, own), f"model: {4 * plan.trained / GIB:.2f} GiB"]


def _checkpoints(config: TrainConfig, size: float) -> str:
    kept = config.checkpoint.keep
    return (
        f"checkpoints every {config.checkpoint.every} steps, {kept} kept: {size / GIB:.2f} GiB each, "
        f"{size * kept / GIB:.2f} GiB of disk"
    )


def _simple_text(config: TrainConfig) -> str:
    """Of the trainings from pictures: they are small, and are built."""
    task = build_task(config)
    parameters = sum(p.numel() for p in task.module.parameters() if p.requires_grad)
    state = 12 + (4 if config.ema_decay else 0)
    lines = [
        f"{stage_of(type(config))}: {parameters:,} parameters, {config.steps:,} steps of {config.batch_size} "
        f"on {config.workers} workers",
        *_time(config, _flops(config, task)),
        f"weights, gradients, moments and average: {parameters * (state + 4) / GIB:.2f} GiB a worker",
        _checkpoints(config, parameters * state),
        *_nodes(config),
    ]
    return "\n".join(lines) + "\n"


def _flops(config: TrainConfig, task: Task) -> float:
    """Of a sample's passes: a VQGAN's by its shape, a CLIP's by a forward pass of two pairs."""
    if isinstance(config, VqganConfig):
        assert isinstance(task, VqganTask)
        shape = asdict(task.network.config)
        encode, decode = (costs.vqgan_gflop(shape, config.crop, decode=whether) for whether in (False, True))
        return 1e9 * (encode * (1.0 if config.train == "decoder" else costs.BACKWARD) + decode * costs.BACKWARD)
    pair = task.batch(np.arange(2), np.ones(2, np.float32))
    with FlopCounterMode(display=False) as counter:
        task.module(pair)
    return costs.BACKWARD * float(counter.get_total_flops()) / 2


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _big(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f} "
