"""Files of prompts: a line each, or a table whose columns say how each is drawn."""

import csv
import functools
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator

from raymuse.config.base import Config, address_within
from raymuse.config.edit import Task
from raymuse.config.errors import UserError
from raymuse.config.explain import sentences
from raymuse.config.sampling import REQUESTED, given_options, own_or_none, with_options
from raymuse.storage.folder import Folder
from raymuse.storage.rejects import Reason

KINDS = (".txt", ".jsonl", ".csv", ".parquet")
_WORDS = re.compile(r"\w+")
SAMPLING = tuple(name for name in REQUESTED if name != "temperature")
AT_A_TIME = 1024  # rows of a table that are held at once


@with_options(own_or_none, SAMPLING)
class Asked(Config):
    """How a row wants to be drawn; what it leaves out is as the run has it."""

    negative: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63, description="of its first picture; those of more samples follow")
    samples: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance: float | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    guidance_from: float | None = Field(None, ge=0, le=1, description="share of the steps with guidance: from ...")
    guidance_to: float | None = Field(None, ge=0, le=1, description="... to")
    size: str | None = Field(None, pattern=r"^\d{1,4}x\d{1,4}$", description="WIDTHxHEIGHT, in whole cells")
    task: Task | None = Field(
        None, description="with an image; none: inpaint where there is a mask, else image-to-image"
    )
    image: str | None = Field(None, description="picture to start from; relative to the prompts' own place")
    mask: str | None = Field(None, description="inpaint: a picture as large, white where to draw")
    strength: float | None = Field(None, ge=0, le=1, description="image-to-image")
    sides: str = Field("0,0,0,0", pattern=r"^\d{1,4}(,\d{1,4}){3}$", description="outpaint: left,top,right,bottom")
    lora: str | None = Field(None, description="one of the job's styles, by its name")
    lora_scale: float = Field(1.0, ge=0, le=2, description="how much of it")

    @model_validator(mode="after")
    def _edits_start_from_an_image(self) -> "Asked":
        if self.image is None and (self.task, self.mask, self.strength) != (None, None, None):
            raise ValueError("task, mask and strength need an image")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """Options beside steps, guidance and temperature."""
        given = given_options(self, SAMPLING)
        if (self.guidance_from, self.guidance_to) != (None, None):
            last = 1.0 if self.guidance_to is None else self.guidance_to
            given["guidance_span"] = (self.guidance_from or 0.0, last)
        return given

    @property
    def grown(self) -> tuple[int, int, int, int]:
        """Pixels to add at the left, top, right and bottom."""
        left, top, right, bottom = map(int, self.sides.split(","))
        return left, top, right, bottom

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height."""
        if self.size is None:
            return None
        width, height = self.size.split("x")
        return int(width), int(height)

    @property
    def what(self) -> Task | None:
        """The task; None: from the prompt alone."""
        if self.image is None:
            return None
        return self.task or ("image-to-image" if self.mask is None else "inpaint")


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


def is_prompts(word: str) -> bool:
    """Whether a word names prompts, by what `read_prompts` reads."""
    return word.endswith(KINDS) or ("/" in word and Folder(word).exists("state.json"))


def read_prompts(address: str) -> Iterator[Prompt]:
    """Prompts, read as they are asked for: a .txt file has one a line, .jsonl, .csv and .parquet a column `prompt`.

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


@dataclass(frozen=True)
class DenyList:
    """Phrases that no prompt may have: whole words, whatever their case.

    Attributes:
        phrases: lower case, in their order.
    """

    phrases: tuple[str, ...] = ()

    @classmethod
    def read(cls, address: str | None) -> "DenyList":
        """From a text file, a phrase a line; lines that are empty or begin with # are none.

        Raises:
            UserError: the file is missing or not UTF-8.
        """
        if address is None:
            return cls()
        folder, name = Folder.holding(address)
        if not folder.exists(name):
            raise UserError(f"the deny list {address} does not exist.")
        with folder.open(name) as file:
            lines = [line.strip().lower() for line in _lines(address, file)]
        phrases = tuple(line for line in lines if line and not line.startswith("#"))
        if wordless := [phrase for phrase in phrases if not _WORDS.search(phrase)]:
            raise UserError(f"the deny list {address} has {wordless[0]!r}, which has no word in it.")
        return cls(phrases)

    def found(self, prompt: str) -> str | None:
        """The first phrase that a prompt has."""
        said = _plain(prompt)
        return next((phrase for phrase in self.phrases if _plain(phrase) in said), None)


def read_beside(prompts: str, name: str, anywhere: bool = False) -> bytes:
    """A file that a row names, relative to the place of the prompts.

    Args:
        anywhere: whether it may lie outside of that place: who writes the rows then reads what this job can read.

    Raises:
        UserError: it lies elsewhere, or cannot be read.
    """
    if not anywhere and (":" in name or name.startswith("/") or ".." in name.split("/")):
        raise UserError(f"{name} does not lie beside the prompts; pictures_anywhere=true allows it")
    address = address_within(Folder.holding(prompts)[0].address, name)
    folder, file = Folder.holding(address)
    try:
        return folder.read(file)
    except Exception as error:  # every store has errors of its own
        raise UserError(f"{address} cannot be read: {error}") from error


@functools.lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """The words of a text, lower case, with a space around each."""
    return f" {' '.join(_WORDS.findall(text.lower()))} "


def _rows(address: str) -> Iterator[dict[str, Any]]:
    folder, name = Folder.holding(address)
    if Folder(address).exists("state.json"):
        yield from _saved(address)
        return
    if not address.endswith(KINDS):
        raise UserError(
            f"{address}: prompts come as .txt (one a line), .jsonl, .csv or .parquet with a column `prompt`, or as a "
            "folder that `Dataset.save_to_disk` wrote."
        )
    if not folder.exists(name):
        raise UserError(f"the prompt file {address} does not exist.")
    with folder.open(name) as file:
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
