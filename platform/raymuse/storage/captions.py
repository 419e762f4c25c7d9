"""Captions and metadata of a picture: from its .txt, its .json, a table beside it, or its name."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymuse.config.errors import UserError
from raymuse.storage.rejects import Reason, Unreadable

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "file", "image", "path")
TEXT_COLUMNS = ("text", "caption", "captions")


@dataclass
class TableRow:
    """What a caption table says about one picture; rows of the same picture are its several captions."""

    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_text(data: bytes) -> str:
    """A caption file as text. A caption that is not UTF-8 is refused, never repaired: half a word trains as noise."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(
            Reason.BAD_CAPTION_ENCODING, f"the caption is not UTF-8: byte {error.start} is {data[error.start]:#04x}"
        ) from error


def parse_metadata(data: bytes) -> dict[str, Any]:
    """A .json member as a dict."""
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(Reason.BAD_METADATA, f"the .json cannot be parsed: {error}") from error
    if not isinstance(fields, dict):
        raise Unreadable(Reason.BAD_METADATA, f"the .json holds a {type(fields).__name__}, not an object")
    return fields


def choose_captions(text: bytes | None, metadata: Mapping[str, Any], spare: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of a picture, without doubles, in their order.

    `captions` in the .json wins (someone listed several on purpose), then the .txt, then `caption` in the .json,
    then `spare` (the table's, or the file name's).

    Raises:
        Unreadable: NO_CAPTION where all of them are empty; BAD_CAPTION_ENCODING.
    """
    found: tuple[str, ...] = _strings(metadata.get("captions"))
    if not found and text is not None:
        found = _strings(parse_text(text))
    elif not found:
        found = _strings(metadata.get("caption")) or _strings(spare)
    if not found:
        raise Unreadable(Reason.NO_CAPTION, "the caption is empty" if text is not None else "there is no caption")
    for caption in found:
        if any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise Unreadable(Reason.BAD_CAPTION_ENCODING, f"the caption is not UTF-8: {caption[:80]!a}")
    return found


def read_table(name: str, data: bytes) -> dict[str, TableRow]:
    """A caption table by picture name (Unicode NFC, since file systems and editors disagree on accents).

    Args:
        name: for messages and, by its ending, the format: .csv or .jsonl.
        data: one row a caption, with a column out of FILE_COLUMNS and one out of TEXT_COLUMNS. A byte that is
            not UTF-8 spoils only its own row.

    Raises:
        UserError: a column is missing, or the table cannot be parsed.
    """
    text = data.decode("utf-8-sig", "surrogateescape")
    rows: dict[str, TableRow] = {}
    for fields in _csv_rows(name, text) if name.endswith(".csv") else _json_rows(name, text):
        file = _pick(name, fields, FILE_COLUMNS)
        caption = _pick(name, fields, TEXT_COLUMNS)
        row = rows.setdefault(unicodedata.normalize("NFC", str(fields[file])), TableRow())
        row.captions += _strings(fields[caption])
        row.metadata |= {key: value for key, value in fields.items() if key not in FILE_COLUMNS + TEXT_COLUMNS}
    return rows


def _csv_rows(name: str, text: str) -> Iterator[dict[str, Any]]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            yield {
                key: value if key in FILE_COLUMNS + TEXT_COLUMNS else _number(value)
                for key, value in row.items()
                if isinstance(key, str)  # None holds the cells beyond the header
            }
    except csv.Error as error:
        raise UserError(f"{name} cannot be parsed: {error}. Write one row a caption, with quotes closed.") from error


def _number(cell: str | None) -> str | int | float | None:
    for kind in (int, float):
        try:
            return kind(cell) if cell is not None else None
        except ValueError:
            continue
    return cell


def _json_rows(name: str, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{name}, line {number} cannot be parsed: {error}. Write one JSON object a line."
            ) from error
        if not isinstance(fields, dict):
            raise UserError(f"{name}, line {number} is no JSON object. Write one JSON object a line.")
        yield fields


def _pick(name: str, fields: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    for column in columns:
        if column in fields:
            return column
    raise UserError(f"{name} needs a column {' or '.join(columns)}; it has {', '.join(fields) or 'none'}.")


def _strings(value: object) -> tuple[str, ...]:
    """The non-empty captions of a string, or of a list of strings; anything else holds none."""
    several = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(dict.fromkeys(text.strip() for text in several if isinstance(text, str) and text.strip()))
