"""What a command would do, for `--dry-run`."""

from raymuse.config.flow import FlowConfig
from raymuse.config.recipe import SECTIONS, stage_of
from raymuse.config.training import MaskedConfig, TrainConfig


def flow_plan(config: FlowConfig) -> str:
    """The stages of a flow, what each writes, and how much each trains."""
    may_be_cut = config.minutes and (config.base.stretch or config.superres.stretch)
    limit = f", within {config.minutes:g} minutes where the fewest steps allow it" if may_be_cut else ""
    lines = [f"flow {config.name} in {config.workdir}{limit}:"]
    for number, (name, model) in enumerate(SECTIONS.items(), start=1):
        section = getattr(config, name).within(config.workdir)
        amount = _amount(section) if isinstance(section, TrainConfig) else ""
        lines.append(f"  {number}. {stage_of(model):<15} -> {section.output}{amount}")
    return "\n".join(lines) + "\n"


def _amount(config: TrainConfig) -> str:
    samples = f"{config.steps * config.batch_size:,} samples"
    return f"  {config.steps:,} steps x {config.batch_size:,} = {samples}{longer(config)}"


def longer(config: TrainConfig) -> str:
    """What a budget adds to a training's steps, as the end of a sentence."""
    if not isinstance(config, MaskedConfig) or (budget := config.stretch) is None:
        return ""
    return f", up to {budget.max_steps:,} steps where they fit into {budget.minutes:g} minutes"
