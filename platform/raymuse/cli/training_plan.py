"""What a training would take, in words, for `--dry-run`."""

from raymuse.config.recipe import stage_of
from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.training.build import build_task
from raymuse.training.plan import Plan, plan_of

GPU, PEAK, SHARE = "H200", 790e12, 0.5  # bf16, measured; the share of it that training is planned to reach
GIB = 2**30


def train_plan(config: TrainConfig) -> str:
    """Parameters, time, memory by ZeRO stage, and disk of a training.

    Raises:
        UserError: as the training itself would.
    """
    if not isinstance(config, MaskedConfig):
        return _simple_text(config)
    plan = plan_of(config)
    return "\n".join([*_work(plan), *_memory(plan), *_disk(plan)]) + "\n"


def _work(plan: Plan) -> list[str]:
    config, sizes, workers = plan.config, plan.sizes, max(1, plan.config.workers)
    what = f"{plan.trained:,} parameters" + (f" to train and {plan.still:,} that stay" if plan.still else "")
    stage = stage_of(type(config))
    lines = [f"{stage}: {what}, {config.steps:,} steps of {config.batch_size:,} on {config.workers} workers"]
    grid = f"grid {sizes.grid[0]} x {sizes.grid[1]}, {sizes.text_tokens} text tokens"
    if plan.rows is None:
        missing = "there are no token shards at" if config.stream is None else "there is no survey yet of"
        lines.append(f"{grid}: by the recipe, since {missing} {config.source}")
    else:
        lines.append(f"{grid}, {plan.rows:,} rows: an epoch is {plan.rows / config.batch_size:,.1f} steps")
    work = plan.flops * config.batch_size
    lines.append(f"work: {_big(plan.flops)}FLOP a sample, {_big(work)}FLOP a step")
    if config.use_gpu and config.precision != "fp32":
        rate = SHARE * PEAK / plan.flops
        hours = config.steps * config.batch_size / (rate * workers) / 3600
        lines.append(
            f"at {SHARE:.0%} of an {GPU}'s {PEAK / 1e12:.0f} TFLOP/s (bf16): {rate:,.0f} samples/s a GPU, "
            f"{rate * workers:,.0f} on {workers}; {_duration(hours)}, {hours * workers:,.1f} GPU hours"
        )
    return lines


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
    parameters = sum(p.numel() for p in build_task(config).module.parameters() if p.requires_grad)
    state = 12 + (4 if config.ema_decay else 0)
    return (
        f"{stage_of(type(config))}: {parameters:,} parameters, {config.steps:,} steps of {config.batch_size} "
        f"on {config.workers} workers\n"
        f"weights, gradients, moments and average: {parameters * (state + 4) / GIB:.2f} GiB a worker\n"
        + _checkpoints(config, parameters * state)
        + "\n"
    )


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def _big(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.2f} {prefix}"
    return f"{number:.0f} "
