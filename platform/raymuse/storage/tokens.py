"""Token shards: Parquet parts of crops as ids, and captions as text ids or as what the encoder said of them.

tokens/part-000000.parquet     one row a crop; with buckets tokens/part-000000-320x192.parquet, one file a shape
captions/part-000000.parquet   one row a caption that the part uses
captions/empty.parquet         the empty caption: what dropped captions become
rejects/part-000000.parquet    refused rows, with reasons
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, read_finished
from raymuse.storage.shard_cache import ShardCache

EMPTY = "empty"
ROW_GROUP_BYTES = 32 << 20


def tokens_schema(grid: tuple[int, int], low_grid: tuple[int, int] | None) -> pa.Schema:
    """Columns of tokens/*.parquet for a grid of (height, width) ids, with `low_ids` where there is a low grid."""
    ids = [
        pa.field("key", pa.string()),
        pa.field("image_ids", pa.list_(pa.uint16(), grid[0] * grid[1])),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
    ]
    if low_grid:
        ids += [
            pa.field("low_ids", pa.list_(pa.uint16(), low_grid[0] * low_grid[1])),
            pa.field("low_height", pa.int32()),
            pa.field("low_width", pa.int32()),
        ]
    facts = [
        pa.field("caption_ids", pa.list_(pa.string())),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("crop_top", pa.int32()),
        pa.field("crop_left", pa.int32()),
        pa.field("aesthetic", pa.float32()),
        pa.field("flip", pa.bool_()),
        pa.field("crop", pa.int32()),
        pa.field("source", pa.string()),
    ]
    return pa.schema([*ids, *facts])


def captions_schema(length: int, width: int | None, pooled: int | None) -> pa.Schema:
    """Columns of captions/*.parquet: `length` text ids, and states of (length, width) with a pooled vector."""
    fields = [
        pa.field("caption_id", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("text_ids", pa.list_(pa.int32(), length)),
        pa.field("text_mask", pa.list_(pa.bool_(), length)),
    ]
    if width is not None and pooled is not None:
        fields.append(pa.field("text_states", pa.list_(pa.float16(), length * width)))
        fields.append(pa.field("pooled", pa.list_(pa.float16(), pooled)))
    return pa.schema(fields)


def caption_id(caption: str) -> str:
    """First 16 hex digits of the caption's sha256."""
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def fixed(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Rows (N, ...) as a fixed-size-list column of `kind`, without a copy of the values."""
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1), type=kind), flat.shape[1])


def parquet_bytes(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    """One Parquet file, the same bytes for the same table, with `metadata` in its schema."""
    buffer = io.BytesIO()
    tagged = table.replace_schema_metadata({key: str(value) for key, value in metadata.items()})
    pq.write_table(tagged, buffer, compression="zstd", use_dictionary=False)
    return buffer.getvalue()


def write_parquet(folder: Folder, name: str, tables: Iterable[pa.Table], metadata: Mapping[str, str]) -> FileRecord:
    """One Parquet file of many tables of one schema, never all in memory; the same bytes for the same tables.

    A row group takes tables until it has ROW_GROUP_BYTES.
    """
    records: list[FileRecord] = []

    def fill(path: Path) -> None:
        rows = 0
        writer: pq.ParquetWriter | None = None
        for group in _groups(tables):
            tagged = group.replace_schema_metadata({key: str(value) for key, value in metadata.items()})
            writer = writer or pq.ParquetWriter(path, tagged.schema, compression="zstd", use_dictionary=False)
            writer.write_table(tagged, row_group_size=max(1, len(tagged)))
            rows += len(tagged)
        if writer is None:
            raise ValueError(f"{name} has no table, not even an empty one: its columns are unknown")
        writer.close()
        records.append(FileRecord.of_file(name, path, rows))

    folder.write_with(name, fill)
    return records[0]


def _groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables joined until they have ROW_GROUP_BYTES; where all are empty, the first as it is."""
    gathered: list[pa.Table] = []
    empty: pa.Table | None = None
    given = False
    for table in tables:
        empty = table.schema.empty_table() if empty is None else empty
        if len(table):
            gathered.append(table)
        if sum(part.nbytes for part in gathered) >= ROW_GROUP_BYTES:
            yield pa.concat_tables(gathered)
            gathered, given = [], True
    if gathered:
        yield pa.concat_tables(gathered)
    elif empty is not None and not given:
        yield empty


READ = frozenset(
    (
        *("image_ids", "height", "width", "low_ids", "low_height", "low_width", "caption_ids", "caption_id"),
        *("original_width", "original_height", "crop_top", "crop_left", "aesthetic"),
        *("text_ids", "text_states", "pooled"),
    )
)
"""Columns that a training reads; captions in words, keys and masks stay on the disk."""


@dataclass(frozen=True)
class TokenPart:
    """One part in memory as arrays: N crops, K captions, T text tokens, E text width, P pooled width."""

    image_ids: NDArray[np.uint16]  # (N, h, w)
    low_ids: NDArray[np.uint16] | None  # (N, h', w')
    micro: NDArray[np.float32]  # (N, 5): original width, original height, crop top, crop left, aesthetic
    caption_rows: NDArray[np.int64]  # rows of the caption arrays, crop after crop
    caption_starts: NDArray[np.int64]  # (N + 1,): where each crop's begin in them
    text_ids: NDArray[np.int32]  # (K, T)
    text_states: NDArray[np.float16] | None  # (K, T, E)
    pooled: NDArray[np.float16] | None  # (K, P)


@dataclass(frozen=True)
class Rows:
    """A batch of rows as arrays, captions already looked up."""

    image_ids: NDArray[np.int64]
    low_ids: NDArray[np.int64] | None
    micro: NDArray[np.float32]
    text_ids: NDArray[np.int64]
    text_states: NDArray[np.float32] | None
    pooled: NDArray[np.float32] | None
    sound: NDArray[np.bool_] | None = None  # (B,): the others are empty places; None: all are rows


class TokenStore:
    """Reads the parts of a finished token folder, a few at a time.

    Args:
        address: output of `raymuse pretokenize`.
        cached_parts: parts held in memory at once.
        cache: copies on this machine's disk that the files are read through; None: they are read where they are.
    """

    def __init__(self, address: str, cached_parts: int = 16, cache: ShardCache | None = None) -> None:
        self.folder = Folder(address)
        self.cache = cache
        records = read_finished(address, "pretokenize")
        self.names = [name for name, record in records.items() if record.rows > 0 and name != EMPTY]
        self.sizes = [records[name].rows for name in self.names]
        if not self.names:
            raise UserError(f"{address} holds no rows: every picture was rejected. See its rejects folder.")
        plain = {f"tokens/{name}.parquet" for name in self.names}
        if not plain <= {file.name for name in self.names for file in records[name].files}:
            raise UserError(
                f"{address} holds crops of several shapes (buckets), which training cannot read yet. "
                "Pretokenize without buckets."
            )
        self.starts = [0, *accumulate(self.sizes)]
        self._files = {file.name: file for record in records.values() for file in record.files}
        sums = [file.sha256 for file in self._files.values()]
        self._fingerprint = hashlib.sha256(json.dumps([self.config, sums], sort_keys=True).encode()).hexdigest()
        self.part = lru_cache(maxsize=cached_parts)(self._read_part)
        self.empty = self._read_captions(EMPTY)

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def config(self) -> dict[str, Any]:
        """What the shards were made with, fingerprints of the encoders among it."""
        return dict(json.loads(self.folder.read("_manifest/config.json")))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the config and the parts' own sums."""
        return self._fingerprint

    def codes(self, column: str) -> int:
        """Size of the codebook that `image_ids` or `low_ids` index."""
        return int(self.config["codebook_size" if column == "image_ids" else "low_codebook_size"])

    @property
    def has_states(self) -> bool:
        return self.empty.text_states is not None

    def grid(self, column: str) -> tuple[int, int]:
        """(height, width) of the ids in `image_ids` or `low_ids`."""
        part = self.part(self.names[0])
        ids = part.image_ids if column == "image_ids" else part.low_ids
        if ids is None:
            raise UserError(
                f"{self.folder.address} holds no {column}: pretokenize with low_resolution=... for super-resolution."
            )
        return int(ids.shape[1]), int(ids.shape[2])

    def rows(self, indices: Sequence[int] | NDArray[np.int64], caption_draws: NDArray[np.float64]) -> Rows:
        """The rows at global `indices` (B,), in that order; `caption_draws` in [0, 1) pick one of several captions."""
        wanted = np.asarray(indices, dtype=np.int64)
        parts = np.searchsorted(self.starts, wanted, side="right") - 1
        pieces: list[Rows] = []
        order: list[NDArray[np.int64]] = []
        for number in np.unique(parts):
            where = np.nonzero(parts == number)[0]
            part = self.part(self.names[int(number)])
            pieces.append(take_rows(part, wanted[where] - self.starts[int(number)], caption_draws[where]))
            order.append(where)
        return join_rows(pieces, np.concatenate(order))

    def keys(self, indices: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The keys of the rows at global `indices`, in that order; read from the files."""
        wanted = np.asarray(indices, dtype=np.int64)
        parts = np.searchsorted(self.starts, wanted, side="right") - 1
        of_part = {
            number: pq.read_table(io.BytesIO(self._read(f"tokens/{self.names[number]}.parquet")), columns=["key"])[
                "key"
            ].to_pylist()
            for number in set(parts.tolist())
        }
        return [
            of_part[part][row - self.starts[part]] for part, row in zip(parts.tolist(), wanted.tolist(), strict=True)
        ]

    def _read(self, name: str) -> bytes:
        return self.folder.read(name) if self.cache is None else self.cache.read(self.folder, self._files[name])

    def _read_part(self, name: str) -> TokenPart:
        file = pq.ParquetFile(io.BytesIO(self._read(f"tokens/{name}.parquet")))
        table = file.read([column for column in file.schema_arrow.names if column in READ])
        return part_of(table, self._read_captions(name), f"{self.folder.address}/tokens/{name}.parquet")

    def _read_captions(self, name: str) -> "Captions":
        file = pq.ParquetFile(io.BytesIO(self._read(f"captions/{name}.parquet")))
        return Captions.of(file.read([column for column in file.schema_arrow.names if column in READ]))


@dataclass(frozen=True)
class Captions:
    """A captions table as arrays: K captions, T text tokens, E text width, P pooled width."""

    keys: pa.Array
    text_ids: NDArray[np.int32]
    text_states: NDArray[np.float16] | None
    pooled: NDArray[np.float16] | None

    @classmethod
    def of(cls, table: pa.Table) -> "Captions":
        """Of a table with the columns of `captions_schema`."""
        text_ids = _values(table, "text_ids")
        states = pooled = None
        if "text_states" in table.column_names:
            states = _values(table, "text_states").reshape(len(table), text_ids.shape[1], -1)
            pooled = _values(table, "pooled")
        return cls(table["caption_id"].combine_chunks(), text_ids, states, pooled)


def part_of(table: pa.Table, captions: Captions, where: str) -> TokenPart:
    """A tokens table and its captions as arrays. Raises ValueError, naming `where`, for captions that are not there."""
    columns = ("original_width", "original_height", "crop_top", "crop_left", "aesthetic")
    micro = np.stack([table[column].to_numpy().astype(np.float32) for column in columns], axis=1)
    ids = table["caption_ids"].combine_chunks()
    rows = pc.index_in(ids.flatten(), value_set=captions.keys)
    if rows.null_count:
        raise ValueError(f"{where} names captions that are not in its table")
    return TokenPart(
        image_ids=_grid(table, "image_ids", "height", "width"),
        low_ids=_grid(table, "low_ids", "low_height", "low_width") if "low_ids" in table.column_names else None,
        micro=micro,
        caption_rows=rows.to_numpy().astype(np.int64),
        caption_starts=np.asarray(ids.offsets, dtype=np.int64) - ids.offsets[0].as_py(),
        text_ids=captions.text_ids,
        text_states=captions.text_states,
        pooled=captions.pooled,
    )


def _values(table: pa.Table, column: str) -> NDArray[Any]:
    chunk = table[column].combine_chunks()
    return np.asarray(chunk.flatten()).reshape(len(table), -1)


def _grid(table: pa.Table, column: str, height: str, width: str) -> NDArray[np.uint16]:
    return _values(table, column).reshape(len(table), table[height][0].as_py(), table[width][0].as_py())


def take_rows(part: TokenPart, rows: NDArray[np.int64], draws: NDArray[np.float64]) -> Rows:
    """Rows of a part by number (B,); `draws` (B,) in [0, 1) pick one of several captions."""
    starts = part.caption_starts[rows]
    counts = part.caption_starts[rows + 1] - starts
    texts = part.caption_rows[starts + (draws * counts).astype(np.int64)]
    return Rows(
        image_ids=part.image_ids[rows].astype(np.int64),
        low_ids=None if part.low_ids is None else part.low_ids[rows].astype(np.int64),
        micro=part.micro[rows],
        text_ids=part.text_ids[texts].astype(np.int64),
        text_states=None if part.text_states is None else part.text_states[texts].astype(np.float32),
        pooled=None if part.pooled is None else part.pooled[texts].astype(np.float32),
    )


def join_rows(pieces: list[Rows], order: NDArray[np.int64]) -> Rows:
    """Concatenate pieces and put their rows back where they were asked for."""
    back = np.argsort(order)

    def join(values: list[NDArray[Any] | None]) -> NDArray[Any] | None:
        present = [value for value in values if value is not None]
        return np.concatenate(present)[back] if present else None

    fields = {name: join([getattr(piece, name) for piece in pieces]) for name in Rows.__dataclass_fields__}
    return Rows(**fields)  # type: ignore[arg-type]
