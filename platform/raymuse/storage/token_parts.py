"""A part of a token folder out of its chunks. Imports no torch: a worker that joins parts starts in a second.

_chunks/part-000000/000003.tokens.arrow     one table of one chunk, gone when the part is in place
"""

import contextlib
import io
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, PartRecord
from raymuse.storage.tokens import write_parquet

TABLES = ("tokens", "captions", "rejects")
CHUNKS, HASHES = "_chunks", "_hashes"  # scratch folders, gone at the end


@dataclass
class MadePart:
    """What is known of a part while its chunks come in, in any order."""

    crops: dict[str, dict[int, int]] = field(default_factory=dict)  # shape -> chunk -> how many
    counts: Counter[str] = field(default_factory=Counter)
    truncated: set[str] = field(default_factory=set)  # ids of captions with more tokens than fit
    chunks: int | None = None  # how many there will be

    def add(self, row: Mapping[str, Any]) -> bool:
        """Take in one chunk; whether the part is now whole."""
        number = int(row["chunk"])
        self.crops.setdefault(str(row["shape"]), {})[number] = int(row["crops"])
        counts, truncated = pickle.loads(row["noticed"])
        self.counts.update(counts)
        self.truncated |= truncated
        if row["last"]:
            self.chunks = number + 1
        return len(self.numbers) == self.chunks

    @property
    def numbers(self) -> list[int]:
        return sorted(number for chunks in self.crops.values() for number in chunks)


def join_part(
    address: str, part: str, made: MadePart, source: str, facts: Mapping[str, Any], bucketed: bool
) -> PartRecord:
    """Join a shard's chunks into its part, a chunk in memory at a time, and put its files in place.

    Leaves the chunks where they are, so that it may be tried again; `remove_chunks` is for when the part is recorded.
    """
    folder, metadata = Folder(address), tagged(facts)

    def tables(name: str, numbers: Iterable[int]) -> Iterator[pa.Table]:
        return (read_table(folder, chunk_file(part, number, name)) for number in numbers)

    def write(name: str, file: str, joined: Iterator[pa.Table]) -> FileRecord:
        return write_parquet(folder, f"{name}/{file}.parquet", joined, metadata)

    tokens = [
        write("tokens", f"{part}-{shape}" if bucketed else part, tables("tokens", sorted(chunks)))
        for shape, chunks in sorted(made.crops.items())
        if any(chunks.values())
    ]
    captions = write("captions", part, _unique(tables("captions", made.numbers)))
    reasons = Counter(reason for table in tables("rejects", made.numbers) for reason in table["reason"].to_pylist())
    rejects = [write("rejects", part, tables("rejects", made.numbers))] if reasons else []
    counts = {**made.counts, "captions": captions.rows, **{f"rejects/{reason}": n for reason, n in reasons.items()}}
    if made.truncated:
        counts["captions_truncated"] = len(made.truncated)
    return PartRecord(
        name=part,
        rows=sum(file.rows for file in tokens),
        rejects=sum(reasons.values()),
        source=source,
        files=[*tokens, captions, *rejects],
        counts={name: float(count) for name, count in sorted(counts.items())},
    )


def remove_chunks(address: str, part: str) -> None:
    """Delete the chunks of a part that is recorded. What cannot be deleted now goes at the end of the stage."""
    with contextlib.suppress(OSError):
        Folder(address).remove(f"{CHUNKS}/{part}")


def _unique(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The first row of every caption, in order."""
    seen: set[str] = set()
    for table in tables:
        first = {key: row for row, key in reversed(list(enumerate(table["caption_id"].to_pylist()))) if key not in seen}
        seen |= first.keys()
        yield table.take(pa.array(sorted(first.values()), pa.int64())).combine_chunks()


def tagged(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts as the metadata of a Parquet file."""
    return {"raymuse." + name: str(value) for name, value in facts.items()}


def chunk_file(part: str, number: int, table: str) -> str:
    return f"{CHUNKS}/{part}/{number:06d}.{table}.arrow"


def hashes_file(part: str) -> str:
    return f"{HASHES}/{part}.arrow"


def write_table(folder: Folder, name: str, table: pa.Table) -> None:
    """Put a scratch table in place, whole; a crash of the machine may take it, and the part is then made again."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    folder.write(name, sink.getvalue(), durable=False)


def read_table(folder: Folder, name: str) -> pa.Table:
    return pa.ipc.open_stream(folder.read(name)).read_all()
