"""Files of prompts: a line each, or a table whose columns say how each is drawn."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from raymuse.config.base import Config
from raymuse.config.errors import UserError
from raymuse.config.explain import sentences
from raymuse.storage.folder import Folder
from raymuse.storage.rejects import Reason

KINDS = (".txt", ".jsonl", ".csv", ".parquet")


class Asked(Config):
    """How a row wants to be drawn; what it leaves out is as the run has it."""

    negative: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63, description="of its first picture; those of more samples follow")
    samples: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    guidance: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)


@dataclass(frozen=True)
class Prompt:
    """A row of a prompt file.

    Attributes:
        index: its place in the file.
        fault: why it cannot be drawn; None where it can.
    """

    index: int
    prompt: str
    key: str
    asked: Asked
    fault: tuple[Reason, str] | None = None


def read_prompts(address: str) -> list[Prompt]:
    """Prompts from a .txt file (one a line), or a .jsonl, .csv or .parquet with a column `prompt`.

    Columns of `Asked` say how a row is drawn, `key` names it, and others are ignored. A row with a wrong value stays in
    its place, with its fault.

    Raises:
        UserError: for a file that is missing, empty, of another kind, or without the column.
    """
    if not address.endswith(KINDS):
        raise UserError(
            f"{address}: prompts come as .txt (one a line), .jsonl, .csv or .parquet with a column `prompt`."
        )
    folder = Folder(str(Path(address).parent) if "://" not in address else address.rpartition("/")[0])
    name = address.rpartition("/")[2]
    if not folder.exists(name):
        raise UserError(f"the prompt file {address} does not exist.")
    rows = list(_rows(address, folder.read(name)))
    if not rows:
        raise UserError(f"{address} holds no prompts.")
    if "prompt" not in rows[0]:
        raise UserError(f"{address} has no column `prompt`; it has {', '.join(rows[0])}.")
    return [_prompt(index, row) for index, row in enumerate(rows)]


def _prompt(index: int, row: dict[str, Any]) -> Prompt:
    prompt, key = str(row.get("prompt") or ""), str(row.get("key") or "")
    given = {name: row[name] for name in Asked.model_fields if row.get(name) not in (None, "")}
    try:
        asked, fault = Asked.model_validate(given), None
    except ValidationError as error:
        asked = Asked()
        fault = (Reason.BAD_PARAMETER, "; ".join(sentences(Asked, error.errors(), lambda path: "")))
    if fault is None and not prompt.strip():
        fault = (Reason.EMPTY_PROMPT, "the prompt is empty")
    return Prompt(index, prompt, key, asked, fault)


def _rows(address: str, data: bytes) -> Iterator[dict[str, Any]]:
    if address.endswith(".parquet"):
        yield from _table(address, data).to_pylist()
        return
    text = _text(address, data)
    if address.endswith(".csv"):
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    lines = text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []
    if address.endswith(".txt"):
        yield from ({"prompt": line} for line in lines)
        return
    yield from (_json_row(address, number, line) for number, line in enumerate(lines, 1) if line.strip())


def _table(address: str, data: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(data))
    except pa.ArrowInvalid as error:
        raise UserError(f"{address} cannot be read as Parquet: {error}") from None


def _text(address: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{address}, line {line} is not UTF-8. Save the file as UTF-8.") from None


def _json_row(address: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{address}, line {number} is no JSON: {error}.") from None
    if not isinstance(row, dict):
        raise UserError(f'{address}, line {number} is no JSON object. Write {{"prompt": "..."}} a line.')
    return row
