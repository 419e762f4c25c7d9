"""What a token folder holds, in one pass over its files: counts, how the codes are used, caption lengths, some rows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import PartRecord
from raymuse.storage.token_parts import TABLES
from raymuse.storage.tokens import EMPTY

_ROWS = 1024


@dataclass
class CodeUsage:
    """How often each code of a codebook stands in the ids.

    Args:
        counts: (C,) int64.
    """

    counts: NDArray[np.int64]

    @classmethod
    def of(cls, codes: int) -> "CodeUsage":
        return cls(np.zeros(codes, dtype=np.int64))

    def add(self, ids: NDArray[np.uint16]) -> None:
        """Count ids of any shape. Raises UserError for one beyond the codebook."""
        if ids.size and int(ids.max()) >= len(self.counts):
            raise UserError(
                f"an id of {int(ids.max())} is beyond the codebook of {len(self.counts)}: see `raymuse tokens verify`."
            )
        self.counts += np.bincount(ids.reshape(-1), minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def used(self) -> int:
        return int((self.counts > 0).sum())

    @property
    def bits(self) -> float:
        """Entropy of an id, in bits; at most log2 of the codebook."""
        shares = self.counts[self.counts > 0] / max(1, self.total)
        return float(-(shares * np.log2(shares)).sum()) + 0.0

    @property
    def perplexity(self) -> float:
        """2 to the entropy: as many codes, all used alike, would say as much."""
        return float(2**self.bits)

    def most_used(self, number: int) -> list[tuple[int, int]]:
        """(code, count) of the codes used most, in falling order; of equals the lower code first."""
        order = np.argsort(-self.counts, kind="stable")[:number]
        return [(int(code), int(self.counts[code])) for code in order if self.counts[code]]


@dataclass(frozen=True)
class TokenRow:
    """One crop with its captions: ids uint16 (h, w), and (h', w') where there are low ones."""

    key: str
    captions: tuple[str, ...]
    image_ids: NDArray[np.uint16]
    low_ids: NDArray[np.uint16] | None


@dataclass
class Survey:
    """What the files hold.

    Args:
        image_ids, low_ids: how their codes are used; None where there are no low ids.
        caption_tokens: captions by their number of tokens, (T + 1,) int64; T of them and more end at T.
        parts: with crops or rejects, without the empty caption's.
        crops, pictures, captions: rows; keys and captions are counted once a part.
        rejects: by reason.
        counts: what the parts' records count, summed.
        grids, low_grids: crops by (height, width) of their ids.
        size: bytes.
        rows: some of the crops, in order.
    """

    image_ids: CodeUsage
    low_ids: CodeUsage | None
    caption_tokens: NDArray[np.int64]
    parts: int = 0
    crops: int = 0
    pictures: int = 0
    captions: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    counts: dict[str, float] = field(default_factory=dict)
    grids: Counter[tuple[int, int]] = field(default_factory=Counter)
    low_grids: Counter[tuple[int, int]] = field(default_factory=Counter)
    size: int = 0
    rows: list[TokenRow] = field(default_factory=list)


def survey_tokens(
    folder: Folder, records: Sequence[PartRecord], codes: tuple[int, int | None], length: int, wanted: Sequence[int]
) -> Survey:
    """Read every file of the records once, a row group in memory.

    Args:
        folder: that holds them.
        records: of the manifest, in order.
        codes: sizes of the codebooks of `image_ids` and `low_ids`.
        length: T, tokens a caption.
        wanted: numbers of the crops to keep, in rising order over all records.

    Raises:
        UserError: a file is missing or damaged.
    """
    low = None if codes[1] is None else CodeUsage.of(codes[1])
    survey = Survey(CodeUsage.of(codes[0]), low, np.zeros(length + 1, dtype=np.int64))
    for record in records:
        survey.size += sum(file.size for file in record.files)
        if record.name != EMPTY:
            _add_part(survey, folder, record, wanted)
    return survey


def spread_rows(total: int, number: int, seed: int) -> list[int]:
    """Up to `number` different rows of `total`, in rising order: one drawn from each of as many equal stretches."""
    number = min(number, total)
    draw = np.random.default_rng(seed)
    edges = [stretch * total // number for stretch in range(number + 1)] if number else [0]
    return [int(draw.integers(low, high)) for low, high in pairwise(edges)]


def _add_part(survey: Survey, folder: Folder, record: PartRecord, wanted: Sequence[int]) -> None:
    survey.parts += 1
    for name, count in record.counts.items():
        survey.counts[name] = survey.counts.get(name, 0) + count
    files = {table: [file.name for file in record.files if file.name.startswith(f"{table}/")] for table in TABLES}
    keys: set[str] = set()
    picked: list[dict[str, Any]] = []
    for name in files["tokens"]:
        for batch in _batches(folder, name, None):
            picked += [_plain(batch, number - survey.crops) for number in _between(wanted, survey.crops, len(batch))]
            _add_crops(survey, batch)
            keys.update(batch["key"].to_pylist())
    survey.pictures += len(keys)
    said = {key for row in picked for key in row["caption_ids"]}
    texts: dict[str, str] = {}
    for name in files["captions"]:
        for batch in _batches(folder, name, ["text_mask", *(["caption_id", "caption"] if said else [])]):
            _add_captions(survey, batch)
            texts |= _texts(batch, said) if said else {}
    survey.rows += [_row(row, texts) for row in picked]
    for name in files["rejects"]:
        for batch in _batches(folder, name, ["reason"]):
            survey.rejects.update(batch["reason"].to_pylist())


def _add_crops(survey: Survey, batch: pa.RecordBatch) -> None:
    survey.crops += len(batch)
    for usage, grids, name, low in (
        (survey.image_ids, survey.grids, "image_ids", ""),
        (survey.low_ids, survey.low_grids, "low_ids", "low_"),
    ):
        if usage is not None:
            usage.add(np.asarray(batch[name].flatten()))
            heights, widths = (batch[f"{low}{side}"].to_pylist() for side in ("height", "width"))
            grids.update(zip(heights, widths, strict=True))


def _add_captions(survey: Survey, batch: pa.RecordBatch) -> None:
    tokens = np.asarray(batch["text_mask"].flatten()).reshape(len(batch), -1).sum(axis=1)
    survey.caption_tokens += np.bincount(tokens, minlength=len(survey.caption_tokens))
    survey.captions += len(batch)


def _texts(batch: pa.RecordBatch, wanted: set[str]) -> dict[str, str]:
    """The captions of a batch that are wanted, by id."""
    pairs = zip(batch["caption_id"].to_pylist(), batch["caption"].to_pylist(), strict=True)
    return {key: text for key, text in pairs if key in wanted}


def _batches(folder: Folder, name: str, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """The rows of a file, a few at a time. Raises UserError where it is missing or damaged."""
    try:
        with sources.open_in_parts((folder / name).address) as stream:
            yield from pq.ParquetFile(stream).iter_batches(_ROWS, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder.address}/{name} cannot be read: {error}. See `raymuse tokens verify`.") from error


def _between(wanted: Sequence[int], start: int, count: int) -> list[int]:
    first, last = np.searchsorted(wanted, [start, start + count])
    return list(wanted[int(first) : int(last)])


def _plain(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    return dict(batch.slice(row, 1).to_pylist()[0])


def _row(row: dict[str, Any], texts: dict[str, str]) -> TokenRow:
    ids = np.array(row["image_ids"], dtype=np.uint16).reshape(row["height"], row["width"])
    low = None
    if "low_ids" in row:
        low = np.array(row["low_ids"], dtype=np.uint16).reshape(row["low_height"], row["low_width"])
    return TokenRow(row["key"], tuple(texts[key] for key in row["caption_ids"]), ids, low)
