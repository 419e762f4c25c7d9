"""Configs written out for people: every key with its value, type and meaning, as YAML that loads again."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from raymuse.config.base import AddressMark, Config
from raymuse.config.explain import section_model

_WIDTH = 44
_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "section", type(None): "null"}


def describe(config: Config | type[Config]) -> str:
    """Annotated YAML: a config's values, or a model's defaults, where what must be given is commented out."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: Config | type[Config], indent: str) -> Iterator[str]:
    model = config if isinstance(config, type) else type(config)
    fields = sorted(model.model_fields.items(), key=lambda item: item[0] != "stage")
    for name, field in fields:
        if name == "stage" and not indent:
            yield _annotated(f"stage: {field.default}", _summary(model))
            continue
        value = _default(field) if isinstance(config, type) else getattr(config, name)
        section = section_model(field.annotation)
        inner = section if value is PydanticUndefined else value
        if section is not None and inner is not None:
            yield _annotated(f"{indent}{name}:", field.description or _summary(section))
            yield from _lines(inner, f"{indent}  ")
        elif value is PydanticUndefined:
            yield _annotated(f"{indent}# {name}:", f"required; {_meaning(field)}")
        else:
            yield _annotated(f"{indent}{name}: {plain_yaml(value)}", _meaning(field))


def plain_yaml(value: Any) -> str:
    """One value as YAML on one line."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _annotated(line: str, comment: str) -> str:
    return f"{line:<{_WIDTH}}  # {comment}" if comment else line


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _summary(section: type[Config]) -> str:
    return (section.__doc__ or "").partition("\n")[0].removesuffix(".")


def _meaning(field: FieldInfo) -> str:
    kind = type_name(field.annotation)
    if any(isinstance(mark, AddressMark) for mark in field.metadata):
        kind = "address"
    return f"{kind}: {field.description}" if field.description else kind


def type_name(annotation: Any) -> str:
    """A type as a person says it: `whole number or null`, `cosine | linear`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "address" if any(isinstance(mark, AddressMark) for mark in parts[1:]) else type_name(parts[0])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts)
    if origin is tuple:
        inner = type_name(parts[0])
        return f"list of {inner}s" if parts[-1] is Ellipsis else f"list of {len(parts)} {inner}s"
    return _NAMES.get(origin or annotation, "value")
