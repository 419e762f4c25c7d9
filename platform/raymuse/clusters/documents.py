"""A cluster file as YAML documents, and documents held against a JSON schema."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from raymuse.config.errors import UserError

Document = dict[str, Any]


def read_documents(path: Path) -> list[Document]:
    """Every document of a file.

    Raises:
        UserError: it cannot be read, is not YAML, or holds something else than mappings.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{path} is no cluster file: it must hold lines of `key: value`.")
    return documents


def name_of(document: Document) -> str:
    """Kind and name, for messages."""
    return f"{document.get('kind')} {mapping(document.get('metadata')).get('name', '(no name)')}"


def mapping(value: Any) -> Document:
    """The value where it is a mapping, else an empty one: rules look into files that a schema has found wrong."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Document]:
    """The mappings among a list's items."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def schema_problems(document: Any, schema: Document) -> Iterator[str]:
    """What a JSON schema (draft 7) finds wrong, a sentence each; unknown keys with what was probably meant."""
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    for error in sorted(errors, key=lambda error: [str(part) for part in error.absolute_path]):
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            known = list(error.schema.get("properties", {}))
            for key in sorted(map(str, set(error.instance) - set(known))):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known[:12])}"
                yield f"{where}.{key}: no such key{hint}".removeprefix(".")
        else:
            yield f"{where}: {error.message}" if where else error.message
