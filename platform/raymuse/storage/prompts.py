"""Files of prompts: a line each, or a table whose columns say how each is drawn."""

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from raymuse.config.base import Config
from raymuse.config.errors import UserError
from raymuse.config.explain import sentences
from raymuse.storage.folder import Folder
from raymuse.storage.rejects import Reason

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
AT_A_TIME = 1024  # rows of a table that are held at once


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


def read_prompts(address: str) -> Iterator[Prompt]:
    """Prompts, read as they are asked for: of a .txt file one a line, of a .jsonl, .csv or .parquet the column `prompt`.

    A folder is a Hugging Face data set as `save_to_disk` writes it. Columns of `Asked` say how a row is drawn, `key`
    names it, and others are ignored. A row with a wrong value stays in its place, with its fault.

    Raises:
        UserError: for a file that is missing, empty, of another kind, or without the column; at the first prompt.
    """
    rows = enumerate(_rows(address))
    if (first := next(rows, None)) is None:
        raise UserError(f"{address} holds no prompts.")
    if "prompt" not in first[1]:
        raise UserError(f"{address} has no column `prompt`; it has {', '.join(first[1])}.")
    yield from (_prompt(index, row) for index, row in itertools.chain([first], rows))


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


def _rows(address: str) -> Iterator[dict[str, Any]]:
    folder, _, name = address.rpartition("/") if "/" in address else (".", "", address)
    if Folder(address).exists("state.json"):
        yield from _saved(address)
        return
    if not address.endswith(KINDS):
        raise UserError(
            f"{address}: prompts come as .txt (one a line), .jsonl, .csv or .parquet with a column `prompt`, or as a "
            "folder that `Dataset.save_to_disk` wrote."
        )
    if not Folder(folder).exists(name):
        raise UserError(f"the prompt file {address} does not exist.")
    with Folder(folder).open(name) as file:
        if address.endswith(".parquet"):
            yield from _table(address, file)
        elif address.endswith(".csv"):
            yield from csv.DictReader(_lines(address, file))
        elif address.endswith(".txt"):
            yield from ({"prompt": line.removesuffix("\n").removesuffix("\r")} for line in _lines(address, file))
        else:
            numbered = enumerate(_lines(address, file), 1)
            yield from (_json_row(address, number, line) for number, line in numbered if line.strip())


def _table(address: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(AT_A_TIME):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{address} cannot be read as Parquet: {error}") from None


def _saved(address: str) -> Iterator[dict[str, Any]]:
    """The rows of a data set that `save_to_disk` wrote."""
    try:
        files = [entry["filename"] for entry in json.loads(Folder(address).read("state.json"))["_data_files"]]
        for name in files:
            with Folder(address).open(name) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{address} is no data set as `Dataset.save_to_disk` writes it: {error}") from error


def _lines(address: str, file: BinaryIO) -> Iterator[str]:
    """Lines with their ends."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{address}, line {number} is not UTF-8. Save the file as UTF-8.") from None


def _json_row(address: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{address}, line {number} is no JSON: {error}.") from None
    if not isinstance(row, dict):
        raise UserError(f'{address}, line {number} is no JSON object. Write {{"prompt": "..."}} a line.')
    return row
