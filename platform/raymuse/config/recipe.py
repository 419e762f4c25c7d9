"""Recipes as written: found by name or path, merged with what they extend, not yet checked."""

import difflib
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from raymuse.config.base import Config, StageConfig, address_within, is_address
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.explain import section_model
from raymuse.config.flow import FlowConfig
from raymuse.config.reading import Document, KeyPath, parse

SECTIONS: dict[str, type[Config]] = {
    name: model
    for name, info in FlowConfig.model_fields.items()
    if (model := section_model(info.annotation)) is not None and issubclass(model, StageConfig)
}
"""The sections of a flow that are stages, in the order of the flow."""


@dataclass
class Raw:
    """A recipe before it is checked: merged values, where each key was written, and what was wrong so far."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """Where a key, or else the section that should hold it, was written: " (my.yaml line 3)", or ""."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return f" ({self.places[path[:length]]})"
        return ""


def read(recipe: str, workdir: str | None = None) -> Raw:
    """A recipe with all that it extends.

    Args:
        recipe: shipped name or path of a YAML file, with `:SECTION` for one section of a flow.
        workdir: where a section's relative addresses lie; None: the flow's own workdir.

    Raises:
        ConfigError: it cannot be read as a recipe.
        UserError: there is no such recipe or section.
    """
    return _read(recipe, Path(), workdir, ())


def recipes() -> list[tuple[str, str]]:
    """Name and first comment line of every shipped recipe, the demo first."""
    shipped = _shipped()
    names = sorted(shipped, key=lambda name: (name != "demo", name))
    return [(name, _first_comment(shipped[name].read_text("utf-8"))) for name in names]


def recipe_text(name: str) -> str:
    """The text of a shipped recipe or of a YAML file.

    Raises:
        UserError: there is no such recipe.
    """
    return _text(name, Path())[0]


def split_section(recipe: str) -> tuple[str, str]:
    """Name (or path) and section of a recipe; "" where it names no section."""
    name, colon, section = recipe.rpartition(":")
    return (name, section) if colon and "/" not in section else (recipe, "")


def stage_of(model: type[Config]) -> str:
    """The stage that a config model belongs to."""
    return str(model.model_fields["stage"].default)


def _read(recipe: str, folder: Path, workdir: str | None, chain: tuple[str, ...]) -> Raw:
    """As `read`; relative paths are looked for in `folder`, and `chain` holds the recipes that led here."""
    name, section = split_section(recipe)
    text, path = _text(name, folder)
    label, identity = (f"{name}.yaml", name) if path is None else (str(path), str(path.resolve()))
    if identity in chain:
        circle = " -> ".join(Path(part).name for part in (*chain[chain.index(identity) :], identity))
        raise ConfigError(label, [f"extends: recipes extend each other in a circle: {circle}"])
    document = parse(text, label)
    parent = document.values.pop("extends", None)
    raw = _of(document)
    if parent is not None:
        home = Path() if path is None else path.parent
        raw = _merge(_parent(parent, document, home, (*chain, identity)), raw)
    return _section(name, section, raw, workdir) if section else raw


def _parent(parent: Any, document: Document, home: Path, chain: tuple[str, ...]) -> Raw:
    if not isinstance(parent, str):
        raise ConfigError(document.name, [f"extends: must be the name or path of one recipe, was {parent!r}"])
    try:
        return _read(parent, home, None, chain)
    except ConfigError:
        raise
    except UserError as error:
        line = document.lines[("extends",)]
        raise ConfigError(document.name, [f"extends: {error} ({document.name} line {line})"]) from None


def _of(document: Document) -> Raw:
    places = {path: f"{document.name} line {line}" for path, line in document.lines.items()}
    return Raw(document.values, places, list(document.problems))


def _merge(below: Raw, above: Raw) -> Raw:
    return Raw(
        _merged(below.values, above.values),
        {**below.places, **above.places},
        [*below.problems, *above.problems],
    )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; a list or a plain value is replaced whole."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return result


def _section(name: str, section: str, raw: Raw, workdir: str | None) -> Raw:
    """One section of a flow as a recipe of its own, its relative addresses moved into the workdir."""
    if raw.values.get("stage") != "flow":
        raise UserError(f"{name} is no flow and has no sections: leave `:{section}` away.")
    if section not in SECTIONS:
        near = difflib.get_close_matches(section, SECTIONS, n=1)
        hint = f" Did you mean {name}:{near[0]}?" if near else ""
        raise UserError(f"{name}:{section}: a flow's sections are {', '.join(SECTIONS)}.{hint}")
    model, values = SECTIONS[section], raw.values.get(section) or {}
    if not isinstance(values, dict):
        raise ConfigError(name, [f"{section}: must be a section, was {values!r}{raw.place((section,))}"])
    root = workdir or str(raw.values.get("workdir", FlowConfig.model_fields["workdir"].default))
    values = {key: _moved(model, key, value, root) for key, value in values.items()}
    places = {path[1:]: place for path, place in raw.places.items() if path[0] == section and len(path) > 1}
    return Raw({"stage": stage_of(model), **values}, places, raw.problems)


def _moved(model: type[Config], key: str, value: Any, root: str) -> Any:
    known = model.model_fields.get(key)
    if known is None or not is_address(known):
        return value
    if isinstance(value, list):
        return [address_within(root, address) if isinstance(address, str) else address for address in value]
    return address_within(root, value) if isinstance(value, str) else value


def _text(name: str, folder: Path) -> tuple[str, Path | None]:
    """Text of a recipe, and its path where it is a file of the user's."""
    if not _is_path(name):
        return _shipped_text(name), None
    path = folder / name
    try:
        return path.read_text("utf-8"), path
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; `raymuse config copy demo {path}` would start one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _shipped_text(name: str) -> str:
    shipped = _shipped()
    if name in shipped:
        return shipped[name].read_text("utf-8")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise UserError(
        f"there is no recipe {name!r}{hint} The shipped ones are {', '.join(sorted(shipped))}; "
        f"a file of your own ends in .yaml."
    )


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _shipped() -> dict[str, Traversable]:
    folder = resources.files("raymuse") / "recipes"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def _first_comment(text: str) -> str:
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
