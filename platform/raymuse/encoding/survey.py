"""Which pictures a training can encode as it runs, found before it starts: one look at every header.

stream/000000.arrow      of one shard: the pictures that can be used, and where their bytes lie
stream/rejects.parquet   the others, and why
stream/empty.parquet     the empty caption, as token shards have it
stream/survey.json       last: rows of every shard, sizes, and what it all was found with

Imports no torch: who decodes pictures starts in a second.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.config.pretokenize import StreamConfig
from raymuse.encoding.chunks import admit, reading_of
from raymuse.storage import sources
from raymuse.storage.folder import Folder
from raymuse.storage.images import Entry, Picture, Shard, read_entries
from raymuse.storage.rejects import Reason, Reject, Unreadable, to_table
from raymuse.storage.token_parts import read_table, write_table
from raymuse.storage.tokens import Captions, parquet_bytes

FOLDER = "stream"
_SURVEY, _EMPTY, _REJECTS = "survey.json", "empty.parquet", "rejects.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("metadata", pa.string()),  # numbers alone, as JSON
        pa.field("address", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
    ]
)
_INDEXES = 32  # shards whose rows a process keeps: more than are shuffled together

Found = tuple[int, list[Reject]]


class Survey:
    """What was found: the rows of all shards, numbered through. Small and picklable; reads an index when it is asked.

    Attributes:
        names: files of the shards that have rows, without their ending.
        sizes: rows of these.
        facts: what the encoders say of themselves, and the grids.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        record = _record(Folder(address))
        if record is None:
            raise UserError(f"{address} holds no finished survey: run the training from its start.")
        rows = [(name, int(count)) for name, count in record["rows"].items() if count]
        self.names, self.sizes = [name for name, _ in rows], [count for _, count in rows]
        self.shards: list[str] = [record["shards"][name] for name in self.names]
        self.starts = [0, *accumulate(self.sizes)]
        self.facts: dict[str, Any] = record["facts"]
        self.rejects: dict[str, int] = record["rejects"]

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def empty(self) -> Captions:
        """The empty caption."""
        return Captions.of(pq.read_table(io.BytesIO(Folder(self.address).read(_EMPTY))))

    def keys(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Keys of rows, in that order."""
        return [self._index(shard)["key"][place].as_py() for shard, place in map(self._place, rows)]

    def source(self, row: int) -> str:
        """The name of the shard that a row lies in."""
        return self.shards[self._place(row)[0]]

    def picture(self, row: int) -> Picture:
        """A row's picture, its bytes read now.

        Raises:
            Unreadable: it is gone, or no longer whole.
            OSError: trying again may help.
        """
        shard, place = self._place(row)
        (found,) = self._index(shard).slice(place, 1).to_pylist()
        data = _read(found["address"], found["offset"], found["size"])
        return Picture(found["key"], data, tuple(found["captions"]), json.loads(found["metadata"]))

    def _place(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, int(row) - self.starts[shard]

    def _index(self, shard: int) -> pa.Table:
        return _index(self.address, self.names[shard])


def digest(shards: Sequence[Shard], config: StreamConfig, facts: Mapping[str, Any]) -> str:
    """What a survey was made of, as one sum: the shards' names, what the config decides, and the encoders."""
    total = hashlib.sha256(json.dumps([config.identity(), dict(facts)], sort_keys=True, default=str).encode())
    for shard in shards:
        total.update(repr(replace(shard, address="")).encode() + b"\n")  # data may move
    return total.hexdigest()


def is_made(address: str, known: str) -> bool:
    """Whether the survey of that digest is there, whole."""
    record = _record(Folder(address))
    return record is not None and record["digest"] == known


def look_through(address: str, config: StreamConfig, number: int, shard: Shard) -> Found:
    """Write the index of one shard; how many of its pictures can be used, and the rows that cannot.

    Raises:
        UserError: the pictures of this kind of input are no spans of a file.
    """
    rows, rejects = [], []
    for row in read_entries(shard, reading_of(config)):
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        try:
            rows.append(_looked_at(row, config))
        except Unreadable as error:
            rejects.append(Reject(shard.name, row.key, error.reason, error.detail))
    write_table(Folder(address), f"{_name(number)}.arrow", pa.Table.from_pylist(rows, schema=_SCHEMA))
    return len(rows), rejects


def write(
    address: str,
    known: str,
    config: StreamConfig,
    shards: Sequence[Shard],
    found: Iterable[Found],
    empty: pa.Table,
    facts: Mapping[str, Any],
) -> Survey:
    """Make the survey count, once every shard is looked through.

    Args:
        known: its digest.
        found: of every shard, in their order.
        empty: the captions table of the empty caption.
        facts: see `Survey`.

    Raises:
        UserError: no picture is left, or more are faulty than the config allows.
    """
    folder, counted = Folder(address), list(found)
    rejects = [reject for _, of_shard in counted for reject in of_shard]
    folder.write(_REJECTS, parquet_bytes(to_table(rejects), {}))
    usable, faults = sum(count for count, _ in counted), sum(not reject.reason.is_filter for reject in rejects)
    reasons = dict(sorted(Counter(str(reject.reason) for reject in rejects).items()))
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    if not usable:
        raise UserError(f"no picture of {', '.join(config.inputs)} can be used ({said or 'there is none'}).")
    if faults > config.max_reject_fraction * (usable + len(rejects)):
        raise UserError(
            f"{faults} of {usable + len(rejects)} pictures of {', '.join(config.inputs)} are faulty ({said}), more "
            f"than stream.max_reject_fraction allows; {address}/{_REJECTS} says which and why."
        )
    record = {
        "digest": known,
        "rows": {_name(number): count for number, (count, _) in enumerate(counted)},
        "shards": {_name(number): shard.name for number, shard in enumerate(shards)},
        "rejects": reasons,
        "facts": dict(facts),
    }
    folder.write(_EMPTY, parquet_bytes(empty, {}))
    folder.write(_SURVEY, json.dumps(record, indent=1).encode())
    return Survey(address)


def _looked_at(entry: Entry, config: StreamConfig) -> dict[str, Any]:
    """The entry as a row of the index. Raises Unreadable where it cannot be used; OSError."""
    picture = entry.picture(_read(entry.address, entry.span.offset, entry.span.size))
    _, captions = admit(picture, config)
    numbers = {name: value for name, value in entry.metadata.items() if isinstance(value, bool | int | float)}
    return {
        "key": entry.key,
        "captions": list(captions),
        "metadata": json.dumps(numbers),
        "address": entry.address,
        "offset": entry.span.offset,
        "size": entry.span.size,
    }


def _read(address: str, offset: int, size: int) -> bytes:
    try:
        data = sources.read_span(address, offset, size)
    except OSError as error:
        if not sources.is_final(error, address):
            raise
        raise Unreadable(Reason.UNREADABLE, str(error)) from error
    if len(data) != size:
        raise Unreadable(Reason.TRUNCATED, f"{address} has changed: of {size} bytes, {len(data)} are there")
    return data


@lru_cache(maxsize=_INDEXES)
def _index(address: str, name: str) -> pa.Table:
    return read_table(Folder(address), f"{name}.arrow").combine_chunks()


def _record(folder: Folder) -> dict[str, Any] | None:
    return dict(json.loads(folder.read(_SURVEY))) if folder.exists(_SURVEY) else None


def _name(number: int) -> str:
    return f"{number:06d}"
