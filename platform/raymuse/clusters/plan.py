"""`raymuse cluster plan`: which stage runs on which machines of a file, for how long, at what cost.

Time of a kind of work = what there is to count / what its machines reach; a stage's kinds of work run side by side, so
that its time is the longest of them. Cost = machines in use x hours x price, and the head beside them. The arithmetic
is in the text, since half of it are assumptions that a user corrects in the price table.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymuse.clusters import costs
from raymuse.clusters.machines import Group, groups_of
from raymuse.clusters.placement import roles_for
from raymuse.clusters.prices import Prices
from raymuse.config.base import Config
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.generate import GenerateConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig, SuperresConfig, VqganConfig

_UNCOUNTED = "the flow's other stages (data, train-clip, export, score) and super-resolution in generate, "
_REACHED = {"encode": "pretokenize", "train": "train", "draw": "generate"}


@dataclass(frozen=True)
class Amounts:
    """What a recipe does not say: how much there is.

    Attributes:
        pictures: to pre-tokenize; None: as the recipe's own data, where it draws them.
        prompts: to draw.
        resolution: pixels a side, where it is not that of the published model that the recipe names.
    """

    pictures: int | None = None
    prompts: int | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class _Use:
    """Machines of a group that a kind of work takes, and what it reaches there."""

    group: Group
    machines: int
    workers: int
    rate: float  # pictures a second
    why: str


def plan_text(recipe: str, config: Config, file: Path, prices: Prices, amounts: Amounts) -> str:
    """The plan as text.

    Raises:
        UserError: for a recipe that asks for more than the file has, or does not say how much there is.
    """
    head, groups = groups_of(file, prices)
    lines, hours, total = [f"{recipe} on {file}"], 0.0, 0.0
    for stage, pieces in stages(config, amounts):
        text, time, cost = _stage(stage, pieces, groups, prices)
        lines += text
        hours, total = hours + time, total + cost
    whole, missing = ("these stages", _UNCOUNTED) if isinstance(config, FlowConfig) else ("in all", "")
    lines += [
        f"head: {head.kind} {_price(head, prices)} x {_hours(hours)} = {_money(head.hour * hours, prices)}",
        f"{whole}: {_hours(hours)} one after the other, {_money(total + head.hour * hours, prices)}",
        f"not counted: {missing}starting machines (minutes each), work done again after a preemption, disks, traffic, "
        "requests.",
        f"shares of a GPU that stages reach are assumptions: {prices.reached.pretokenize:g} pretokenize, "
        f"{prices.reached.train:g} train, {prices.reached.generate:g} generate; measure, and put yours into --prices.",
    ]
    return "\n".join(lines)


def stages(config: Config, amounts: Amounts) -> Iterator[tuple[str, list[costs.Piece]]]:
    """The stages of a recipe with their kinds of work, in the order in which they run."""
    if isinstance(config, FlowConfig):
        yield from _flow(config, amounts)
    elif isinstance(config, PretokenizeConfig):
        if amounts.pictures is None:
            raise UserError("how many pictures are there? Say --images N: the plan does not read the input.")
        yield "pretokenize", costs.pretokenizing(config, amounts.pictures)
    elif isinstance(config, BaseConfig | SuperresConfig):
        yield config.stage, [costs.training(config, amounts.resolution or costs.resolution_of(config))]
    elif isinstance(config, VqganConfig):
        yield config.stage, [costs.training_vqgan(config)]
    elif isinstance(config, GenerateConfig):
        if amounts.prompts is None:
            raise UserError("how many prompts are there? Say --prompts N: the plan does not read the file.")
        yield "generate", [costs.generating(config, amounts.prompts, amounts.resolution or costs.resolution_of(config))]
    else:
        raise UserError(
            "a plan is made for pretokenize, train-vqgan, train-base, train-superres, generate, or a whole flow."
        )


def _flow(config: FlowConfig, amounts: Amounts) -> Iterator[tuple[str, list[costs.Piece]]]:
    shape, tokens = config.vqgan.model, config.pretokenize
    base = tokens.low_resolution if config.base.ids == "low_ids" and tokens.low_resolution else tokens.resolution
    text = costs.text_of(config.clip)
    yield "train-vqgan", [costs.training_vqgan(config.vqgan)]
    yield "pretokenize", costs.pretokenizing(tokens, amounts.pictures or config.data.train, shape, text)
    yield "train-base", [costs.training(config.base, base, vqgan=shape, text=text)]
    yield "train-superres", [costs.training(config.superres, tokens.resolution, tokens.low_resolution, shape, text)]
    prompts = amounts.prompts or config.data.test
    yield "generate", [costs.generating(config.generate, prompts, base, config.base, shape, text)]


def _stage(
    stage: str, pieces: Sequence[costs.Piece], groups: Sequence[Group], prices: Prices
) -> tuple[list[str], float, float]:
    """Text, hours and cost of a stage."""
    uses = [(piece, _uses(stage, piece, groups, prices)) for piece in pieces]
    times = [piece.count / sum(use.rate for use in found) / 3600 for piece, found in uses]
    hours, cost, lines = (
        max(times),
        0.0,
        [f"{stage}: {pieces[0].count:,} {'samples' if stage.startswith('train') else 'pictures'}"],
    )
    for (piece, found), time in zip(uses, times, strict=True):
        for use in found:
            spent = use.machines * use.group.hour * hours
            cost += spent
            lines.append(
                f"  {piece.what}: {use.machines} x {use.group.kind} ({use.group.name}), "
                f"{use.why} = {use.rate:,.1f} a second"
            )
            lines.append(
                f"    {use.machines} x {_price(use.group, prices)} x {_hours(hours)} = {_money(spent, prices)}"
            )
        if piece.sum:
            lines.append(f"    one is {piece.gflop:,.1f} GFLOP: {piece.sum}")
        limit = "  <- this decides" if len(pieces) > 1 and time == hours else ""
        lines.append(f"    {piece.count:,} / {sum(use.rate for use in found):,.1f} a second = {_hours(time)}{limit}")
        lines += _more(piece, groups)
    return lines, hours, cost


def _uses(stage: str, piece: costs.Piece, groups: Sequence[Group], prices: Prices) -> list[_Use]:
    """The machines that the workers of a kind of work fill, group by group."""
    left, found = piece.workers, []
    for group in _fitting(piece, groups):
        fit = _workers_on(piece, group)
        if left and fit:
            workers = min(left, fit * group.most)
            found.append(_use(piece, group, math.ceil(workers / fit), workers, prices))
            left -= workers
    if left:
        have = ", ".join(f"{g.name} {g.most} x {_workers_on(piece, g)}" for g in _fitting(piece, groups)) or "none"
        each = f"{piece.gpus:g} GPU" if piece.gpus else f"{piece.cpus:g} cores"
        raise UserError(
            f"{stage}: the recipe asks for {piece.workers} workers of {each} to {piece.what}, and the file has room "
            f"for {piece.workers - left} ({have}): lower them in the recipe, or raise the groups' most in the file."
        )
    return [use for use in found if use.workers]


def _use(piece: costs.Piece, group: Group, machines: int, workers: int, prices: Prices) -> _Use:
    if piece.gflop is None:
        each = prices.core.pictures_per_second
        return _Use(group, machines, workers, workers * each, f"{workers} cores x {each:g}")
    if piece.gpus:
        share, gpu = getattr(prices.reached, _REACHED[piece.work]), str(group.machine.gpu)
        tflops = prices.gpus[gpu].tflops
        rate = workers * piece.gpus * tflops * 1000 * share / piece.gflop
        return _Use(
            group,
            machines,
            workers,
            rate,
            f"{workers * piece.gpus:g} {gpu} x {tflops:g} TFLOP/s x {share:g} / {piece.gflop:,.1f} GFLOP",
        )
    tflops = prices.core.tflops
    rate = workers * piece.cpus * tflops * 1000 / piece.gflop
    return _Use(
        group,
        machines,
        workers,
        rate,
        f"{workers * piece.cpus:g} cores x {tflops:g} TFLOP/s / {piece.gflop:,.1f} GFLOP",
    )


def _fitting(piece: costs.Piece, groups: Sequence[Group]) -> list[Group]:
    """Groups whose role does this work; without roles, those with GPUs for work that asks for them."""
    if any(group.role for group in groups):
        return [group for group in groups if group.role in roles_for(piece.work, piece.gpus)]
    return [group for group in groups if bool(group.machine.gpus) == bool(piece.gpus)] or list(groups)


def _workers_on(piece: costs.Piece, group: Group) -> int:
    """How many workers a machine of a group holds."""
    by_cores = int(group.machine.cpus / piece.cpus) if piece.cpus else 0
    if not piece.gpus:
        return by_cores
    return min(by_cores, int(group.machine.gpus / piece.gpus))


def _more(piece: costs.Piece, groups: Sequence[Group]) -> Iterator[str]:
    """Where the file has room for more workers than the recipe asks for."""
    room = sum(group.most * _workers_on(piece, group) for group in _fitting(piece, groups))
    if room > piece.workers:
        yield f"    the recipe asks for {piece.workers} workers; these groups have room for {room}"


def _price(group: Group, prices: Prices) -> str:
    return f"{prices.currency} {group.hour:g}/h {'spot' if group.spot else 'on demand'}"


def _money(amount: float, prices: Prices) -> str:
    return f"{prices.currency} {amount:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 0.1 else f"{hours * 3600:,.0f} s"
