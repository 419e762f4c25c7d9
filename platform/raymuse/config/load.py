"""Recipes and overrides to checked configs.

load("demo")                                     a shipped recipe
load("my.yaml", ["base.steps=2000"])             a file, changed
load("demo:base", ["optimizer.lr=1e-4"])         one section of a flow as that stage's own config
"""

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from raymuse.config.base import Config
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.explain import sentences
from raymuse.config.flow import FlowConfig
from raymuse.config.reading import KeyPath, parse_value
from raymuse.config.recipe import SECTIONS, Raw, read, recipes, split_section, stage_of
from raymuse.config.stages import STAGES


def load(recipe: str, overrides: Sequence[str] = (), stage: str | Collection[str] | None = None) -> Config:
    """The checked config of a recipe.

    Relative addresses are relative to the working directory; those that a flow's section brings along are
    relative to the flow's `workdir`, which an override `workdir=...` may move.

    Args:
        recipe: a shipped recipe's name, the path of a YAML file, or either with `:SECTION` for a flow's section.
        overrides: `a.b=value`, the value as in YAML; `a.b=` is the empty string.
        stage: the stage, or stages, that the caller can run; None takes any.

    Raises:
        ConfigError: with everything that was wrong.
        UserError: there is no such recipe, or it belongs to another stage.
    """
    changes, problems = _parse(overrides)
    workdir = None
    if split_section(recipe)[1]:
        workdir = next((str(change.value) for change in reversed(changes) if change.path == ("workdir",)), None)
        changes = [change for change in changes if change.path != ("workdir",)]
    raw = read(recipe, workdir)
    raw.problems.extend(problems)
    _apply(raw, changes)
    model = _model(recipe, raw)
    if stage is not None:
        _check_stage(recipe, model, {stage} if isinstance(stage, str) else set(stage))
    return _validated(recipe, model, raw)


def from_values(stage: str, values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A checked config from a stage's defaults, some values, and overrides: no recipe.

    Raises:
        ConfigError: with everything that was wrong.
    """
    changes, problems = _parse(overrides)
    raw = Raw(dict(values), problems=problems)
    _apply(raw, changes)
    return _validated(stage, STAGES[stage], raw)


def sections_for(stages: Collection[str]) -> list[str]:
    """The sections of a flow that hold one of these stages."""
    return [name for name, model in SECTIONS.items() if stage_of(model) in stages]


def recipes_for(stages: Collection[str]) -> list[str]:
    """What is shipped for one of these stages: sections of the flows (`demo:base`), then recipes of its own."""
    written = {name: read(name).values.get("stage") for name, _ in recipes()}
    flows = [name for name, stage in written.items() if stage == "flow"]
    sections = [f"{name}:{section}" for section in sections_for(stages) for name in flows]
    return [*sections, *(name for name, stage in written.items() if stage in stages)]


def command(stage: str) -> str:
    """The command line that runs a stage's recipe, up to the recipe."""
    if stage == "flow":
        return "raymuse demo --recipe"
    if stage in ("sweep", "compare"):
        return "raymuse score"
    return f"raymuse {'train' if stage.startswith('train-') else stage}"


def _validated(where: str, model: type[Config], raw: Raw) -> Config:
    try:
        config = model.model_validate(raw.values)
    except ValidationError as error:
        found = sentences(model, error.errors(), raw.place)
        raise ConfigError(where, [*raw.problems, *found]) from None
    if raw.problems:
        raise ConfigError(where, raw.problems)
    return config


def _model(recipe: str, raw: Raw) -> type[Config]:
    name = raw.values.get("stage")
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    near = difflib.get_close_matches(str(name), STAGES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    was = "missing" if name is None else f"there is no {name!r}{hint}"
    problem = f"stage: {was}; it is one of {', '.join(STAGES)}{raw.place(('stage',))}"
    raise ConfigError(recipe, [*raw.problems, problem])


def _check_stage(recipe: str, model: type[Config], allowed: set[str]) -> None:
    stage = stage_of(model)
    if stage in allowed:
        return
    if model is FlowConfig:
        fitting = " or ".join(f"{recipe}:{name}" for name in sections_for(allowed))
        parts = f" Of its sections, this command takes {fitting}." if fitting else ""
        raise UserError(f"{recipe} is a whole flow: run it with `{command(stage)} {recipe}`.{parts}")
    raise UserError(f"{recipe} is a config of {stage}: run it with `{command(stage)} {recipe}`.")


@dataclass(frozen=True)
class _Change:
    path: KeyPath
    value: Any
    text: str


def _parse(overrides: Iterable[str]) -> tuple[list[_Change], list[str]]:
    changes, problems = [], []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(f"{text!r} is no override: write KEY=VALUE, like base.steps=2000")
            continue
        try:
            changes.append(_Change(path, parse_value(value), text))
        except ValueError as error:
            problems.append(f"{key}: the value {value!r} is {error}; quote it if it is text")
    return changes, problems


def _apply(raw: Raw, changes: Iterable[_Change]) -> None:
    for change in changes:
        try:
            raw.values = _with(raw.values, change.path, change.value)
        except _NoSection as blocking:
            raw.problems.append(f"{'.'.join(change.path)}: {blocking} is a value, not a section")
        else:
            raw.places[change.path] = f"given as {change.text}"


class _NoSection(Exception):  # noqa: N818 - never leaves this module
    """An override leads through a plain value; the argument is that value's name."""


def _with(values: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """A copy of nested `values` with one of them set."""
    name, *rest = path
    if not rest:
        return {**values, name: value}
    inner = values.get(name)
    if inner is not None and not isinstance(inner, dict):
        raise _NoSection(name)
    return {**values, name: _with(inner or {}, tuple(rest), value)}
