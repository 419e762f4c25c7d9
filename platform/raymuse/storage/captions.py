"""Captions and metadata of a picture: from its .txt, its .json, a table beside it, or its name."""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymuse.config.errors import UserError
from raymuse.storage.rejects import Reason, Unreadable
from raymuse.storage.rows import Reading

TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "file", "image", "path")
TEXT_COLUMNS = ("text", "caption", "captions")

CLEANED, REPAIRED = "captions_cleaned", "captions_repaired"
_SURROGATES = re.compile("[\ud800-\udfff]")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Control characters that are no white space, and those that turn the direction of what follows.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Captions:
    """The captions of a picture: at least one, none empty; and what was mended, each once."""

    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass
class TableRow:
    """What a caption table says about one picture; rows of the same picture are its several captions."""

    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


def parse_metadata(data: bytes, reading: Reading) -> dict[str, Any]:
    """A .json member as a dict. Where captions are to be repaired, bytes that are not UTF-8 become lone surrogates."""
    try:
        fields = json.loads(data.decode("utf-8-sig", "surrogateescape" if reading.repair_captions else "strict"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(Reason.BAD_METADATA, f"the .json cannot be parsed: {error}") from error
    if not isinstance(fields, dict):
        raise Unreadable(Reason.BAD_METADATA, f"the .json holds a {type(fields).__name__}, not an object")
    return fields


def choose_captions(
    text: bytes | None, metadata: Mapping[str, Any], spare: tuple[str, ...], reading: Reading
) -> Captions:
    """The captions of a picture in a tar or folder, in their order.

    Where `reading` names a field, captions come from that field of the .json, or else from `spare` (the table's).
    Where not, `captions` in the .json wins (someone listed several on purpose), then the .txt, then `caption` in the
    .json, then `spare` (the table's, or the file name's).

    Raises:
        Unreadable: NO_CAPTION where all of them are empty; BAD_CAPTION_ENCODING.
    """
    if reading.caption_column is not None:
        found = _strings(metadata.get(reading.caption_column)) or spare
        return clean_captions(found, reading, f"there is no caption in {reading.caption_column!r}")
    several = _strings(metadata.get("captions"))
    if several:
        return clean_captions(several, reading)
    if text is not None:
        return clean_captions((text,), reading, "the caption is empty")
    return clean_captions(_strings(metadata.get("caption")) or spare, reading)


def clean_captions(found: Iterable[str | bytes], reading: Reading, missing: str = "there is no caption") -> Captions:
    """Captions as they are trained on: text, without unseen characters, stripped, each once, behind the prefix.

    Args:
        found: captions as they stand in the input; bytes should be UTF-8.
        missing: what to say where none is left.

    Raises:
        Unreadable: NO_CAPTION; BAD_CAPTION_ENCODING, unless `reading` says to repair.
    """
    texts: dict[str, None] = {}
    notes: set[str] = set()
    for raw in found:
        text, repaired = _decode(raw, reading.repair_captions)
        seen = _UNSEEN.sub("", text)
        notes |= {note for note, happened in ((REPAIRED, repaired), (CLEANED, seen != text)) if happened}
        if seen := seen.strip():
            texts[reading.caption_prefix + seen] = None
    if not texts:
        raise Unreadable(Reason.NO_CAPTION, missing)
    return Captions(tuple(texts), tuple(sorted(notes)))


def _decode(raw: str | bytes, repair: bool) -> tuple[str, bool]:
    """A caption as text, and whether it had to be repaired. Unrepaired, half a word would train as noise."""
    if isinstance(raw, bytes):
        if repair and raw.startswith(_UTF16):
            return raw.decode("utf-16", "ignore"), True
        try:
            return raw.decode("utf-8-sig"), False
        except UnicodeDecodeError as error:
            if not repair:
                detail = f"the caption is not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
                raise Unreadable(Reason.BAD_CAPTION_ENCODING, detail) from error
            raw = raw.decode("utf-8-sig", "surrogateescape")
    if not _SURROGATES.search(raw):
        return raw, False
    if not repair:
        raise Unreadable(Reason.BAD_CAPTION_ENCODING, f"the caption is not UTF-8: {raw[:80]!a}")
    return _SURROGATES.sub(lambda match: _odd_letter(match[0]), raw), True


def _odd_letter(surrogate: str) -> str:
    """What a byte that is no UTF-8 (a low surrogate, as Python keeps it) means in Windows' Latin-1.

    Any other surrogate is half of a letter, and says nothing.
    """
    byte = ord(surrogate) - 0xDC00
    if not 0x80 <= byte <= 0xFF:
        return ""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


def read_table(name: str, data: bytes, reading: Reading) -> dict[str, TableRow]:
    """A caption table by picture name (Unicode NFC, since file systems and editors disagree on accents).

    Args:
        name: for messages and, by its ending, the format: .csv or .jsonl.
        data: one row a caption, with a column out of FILE_COLUMNS and one out of TEXT_COLUMNS, or the one that
            `reading` names. A byte that is not UTF-8 spoils only its own row; so does a missing caption.

    Raises:
        UserError: a column is missing in every row, or the table cannot be parsed.
    """
    text = data.decode("utf-8-sig", "surrogateescape")
    columns = TEXT_COLUMNS if reading.caption_column is None else (reading.caption_column,)
    known = {*FILE_COLUMNS, *TEXT_COLUMNS, *columns}
    rows: dict[str, TableRow] = {}
    told = False
    fields: Mapping[str, Any] = {}
    for fields in _csv_rows(name, text, known) if name.endswith(".csv") else _json_rows(name, text):
        file = _pick(name, fields, FILE_COLUMNS)
        row = rows.setdefault(unicodedata.normalize("NFC", str(fields[file])), TableRow())
        if caption := next((column for column in columns if column in fields and column != file), None):
            row.captions += _strings(fields[caption])
            told = True
        row.metadata |= {key: value for key, value in fields.items() if key not in known}
    if rows and not told:
        _pick(name, fields, columns)
    return rows


def _csv_rows(name: str, text: str, known: set[str]) -> Iterator[dict[str, Any]]:
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            yield {
                key: value if key in known else _number(value)
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
