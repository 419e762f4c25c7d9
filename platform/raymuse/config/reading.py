"""YAML text to plain values, with the line of every key, and without YAML 1.1's surprises."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from raymuse.config.errors import ConfigError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Resolves scalars as YAML 1.2 does: 1e-3 is a number; `no`, 1:30 and 2024-01-01 are text, and 010 is ten.

    A field of type bool still takes yes/no/on/off: pydantic reads them.
    """


_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


@dataclass
class Document:
    """One YAML text, read: its values, the line (from 1) of each key by its path, and what was wrong with it."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def parse(text: str, name: str) -> Document:
    """Read a YAML mapping. Duplicate keys land in `problems`, since PyYAML would silently keep the last.

    Args:
        text: the YAML.
        name: what to call it in messages.

    Raises:
        ConfigError: the text is not YAML, or not a mapping of keys to values.
    """
    document = Document(name, {})
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            _walk(root, (), document)
            document.values = _plain_keys(loader.construct_document(root))
        elif root is not None:
            raise ConfigError(name, ["must be lines of `key: value`, and is something else"])
    except yaml.YAMLError as error:
        raise ConfigError(name, [_syntax_problem(error)]) from None
    except RecursionError:
        raise ConfigError(name, ["not a config: an alias (*name) stands within its own anchor (&name)"]) from None
    return document


def parse_value(text: str) -> Any:
    """One value as it would stand after `key: `; nothing at all is the empty string.

    Raises:
        ValueError: the text is not YAML.
    """
    if not text.strip():
        return ""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(_syntax_problem(error)) from None


def _walk(node: yaml.MappingNode, path: KeyPath, document: Document) -> None:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        here = (*path, name)
        if name in seen:
            where = f"{document.name} lines {seen[name]} and {line}"
            document.problems.append(f"{'.'.join(here)}: given twice ({where}): keep one")
        seen[name] = document.lines[here] = line
        if isinstance(value_node, yaml.MappingNode):
            _walk(value_node, here, document)


def _plain_keys(value: Any) -> Any:
    """Keys as text: a key that YAML reads as a number or nothing is still only a name."""
    if isinstance(value, dict):
        return {str(key): _plain_keys(item) for key, item in value.items()}
    return value


def _syntax_problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML: {error}"
    mark = error.problem_mark
    what = error.problem or error.context or "cannot be read"
    hint = " (indent with spaces)" if "'\\t'" in what else ""
    return f"not YAML: {what}{hint}, line {mark.line + 1} column {mark.column + 1}"
