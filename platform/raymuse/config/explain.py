"""What pydantic found wrong, in sentences for the person who wrote the config."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from raymuse.config.base import Config
from raymuse.config.reading import KeyPath

_NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list, like [a, b]",
    "list": "a list, like [a, b]",
    "dict": "a section (its own `key: value` lines)",
    "model": "a section (its own `key: value` lines)",
    "finite_number": "a finite number",
}

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def sentences(model: type[Config], errors: Iterable[ErrorDetails], where: Callable[[KeyPath], str]) -> list[str]:
    """One sentence an error, naming the key and, where `where` knows it, the place it was written at.

    Args:
        model: the config that was checked.
        errors: `ValidationError.errors()`.
        where: path of a key -> its place (" (my.yaml line 3)"), or "".
    """
    found = []
    for error in errors:
        path = tuple(str(part) for part in error["loc"])
        found.append(f"{_sentence(model, path, error)}{where(path)}")
    return found


def _sentence(model: type[Config], path: KeyPath, error: ErrorDetails) -> str:
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    name = ".".join(path)
    if kind == "extra_forbidden":
        return f"{name}: no such key{_suggestion(model, path)}"
    if kind == "missing":
        meaning = _meaning(model, path)
        return f"{name}: missing ({meaning})" if meaning else f"{name}: missing"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{name}: must be {word} {context[key]}, was {given}"
    if kind == "literal_error":
        return f"{name}: must be {context['expected']}; was {shown(given)}{_nearest_literal(model, path, given)}"
    if kind == "value_error":
        message = str(context.get("error", error["msg"]))
        return f"{name}: {message}" if name else message
    wanted = _wanted(kind)
    if wanted:
        return f"{name}: must be {wanted}, was {shown(given)}{_type_hint(kind, given)}"
    return f"{name}: {error['msg']}, was {shown(given)}"


def _wanted(kind: str) -> str | None:
    if kind == "int_from_float":
        return _WANTED["int"]
    stem = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_attributes")
    return _WANTED.get(stem)


def _type_hint(kind: str, given: Any) -> str:
    if isinstance(given, str) and given.lower() == "none":
        return "; nothing at all is written `null`"
    if kind == "string_type" and isinstance(given, int | float):
        return f"; quote it to make it text: '\"{given}\"'"
    return ""


def shown(value: Any) -> str:
    """A value as a person would say it: `'abc'`, `3 (a whole number)`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return repr(value) if value else "empty"
    noun = _NOUNS.get(type(value))
    text = str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."
    return f"{text} ({noun})" if noun else text


def _suggestion(model: type[Config], path: KeyPath) -> str:
    """The nearest key beside it; else keys of that name below it or elsewhere; else what keys there are."""
    siblings, prefix = _fields(model, path[:-1]), ".".join((*path[:-1], ""))
    beside = [prefix + name for name in difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.7)]
    every = list(key_paths(model))
    namesakes = [known for known in every if known.rpartition(".")[2] == path[-1]]
    below = [known for known in namesakes if known.startswith(prefix)]
    near = beside or below or namesakes or difflib.get_close_matches(".".join(path), every, n=2, cutoff=0.7)
    if near:
        return f"; did you mean {_either(near[:6])}?"
    return f"; the keys here are {', '.join(siblings)}" if siblings else ""


def _nearest_literal(model: type[Config], path: KeyPath, given: Any) -> str:
    field = _field(model, path)
    choices = [str(choice) for choice in get_args(field.annotation)] if field is not None else []
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config model."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        section = section_model(field.annotation)
        if section is not None:
            yield from key_paths(section, f"{prefix}{name}.")


def section_model(annotation: Any) -> type[Config] | None:
    """The config model of a field that is a section of its own; None for any other field, also one of many by name."""
    if get_origin(annotation) is dict:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _field(model: type[Config], path: KeyPath) -> Any:
    at: type[Config] | None = model
    field = None
    for name in path:
        field = at.model_fields.get(name) if at is not None else None
        at = section_model(field.annotation) if field is not None else None
    return field


def _fields(model: type[Config], path: KeyPath) -> list[str]:
    if not path:
        return list(model.model_fields)
    field = _field(model, path)
    section = section_model(field.annotation) if field is not None else None
    return list(section.model_fields) if section is not None else []


def _meaning(model: type[Config], path: KeyPath) -> str | None:
    field = _field(model, path)
    if field is None:
        return None
    section = section_model(field.annotation)
    if section is not None:
        required = [name for name, inner in section.model_fields.items() if inner.is_required()]
        return f"a section with {', '.join(required)}" if required else "a section"
    return str(field.description) if field.description else None


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
