"""Parquet files with pictures, or with their addresses, as shards and rows.

A shard is a run of row groups; a row group is never split, and is read a few rows at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from raymuse.storage import sources
from raymuse.storage.places import Place, ending_of
from raymuse.storage.rejects import Reason, Reject
from raymuse.storage.rows import Blocks, Picture, Reading, Shard
from raymuse.storage.table_files import TableFiles, Unopened
from raymuse.storage.table_rows import TableReader, choose_columns, is_damage

BATCH_ROWS = 16  # decoded at a time: pictures of a few MB each are common
BUFFER_BYTES = 1 << 20  # of each column; without it Arrow reads a row group's whole column at once


def list_shards(place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
    """Runs of row groups, by the footers of the files. A file whose footer cannot be read is a shard that is refused.

    Raises:
        UserError: no file can be read, none has a row, or a file lacks a column.
    """
    names = [name for name in place.files if ending_of(name) == "parquet"]
    files = TableFiles(place.address, place.folder, names)
    return files.shards("parquet", lambda address: _block_rows(address, reading), images_per_shard)


def read_shard(shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
    """The rows of a run of row groups; a file or row group that is damaged is one Reject."""
    try:
        with _opened(shard.address) as file:
            columns = choose_columns(file.schema_arrow, reading, shard.address)
            reader = TableReader.of_file(shard, columns, reading)
            for piece in _batches(file, shard, columns.names):
                if isinstance(piece, Reject):
                    yield piece
                else:
                    yield from reader.rows(piece.batch, piece.first_row)
    except Unopened as error:
        yield Reject(shard.name, "", Reason.SHARD_UNREADABLE, str(error))


def count_rows(shards: Sequence[Shard], reading: Reading) -> int:
    return sum(shard.blocks.rows for shard in shards if shard.blocks)


@dataclass(frozen=True)
class _Batch:
    batch: pa.RecordBatch
    first_row: int


@contextmanager
def _opened(address: str) -> Iterator[pq.ParquetFile]:
    """Raises Unopened, or OSError where trying again may help."""
    stream = None
    path = sources.local_path(address)
    try:
        stream = sources.open_in_parts(address) if path is None else pa.OSFile(str(path))
        file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        damaged = is_damage(error) and (path is not None or stream is not None)  # else it is the store that refuses
        if stream is not None:
            stream.close()
        if damaged or (isinstance(error, OSError) and sources.is_final(error, address)):
            raise Unopened(f"{address} cannot be read as Parquet: {error}") from error
        raise
    with stream:
        yield file


def _block_rows(address: str, reading: Reading) -> list[int]:
    """How many rows each row group has, by the footer. Raises Unopened; UserError where a column is missing."""
    with _opened(address) as file:
        choose_columns(file.schema_arrow, reading, address)
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def _batches(file: pq.ParquetFile, shard: Shard, columns: list[str]) -> Iterator[_Batch | Reject]:
    """The shard's batches with the numbers of their first rows. Where a row group breaks off, the next goes on."""
    rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    blocks = shard.blocks or Blocks(0, len(rows), 0, sum(rows))
    if sum(rows[: blocks.start]) != blocks.first_row or sum(rows[blocks.start : blocks.stop]) != blocks.rows:
        yield Reject(shard.name, "", Reason.SHARD_UNREADABLE, "the file has changed since the plan was made")
        return
    first_row = blocks.first_row
    for group in range(blocks.start, blocks.stop):
        done = 0
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                yield _Batch(batch, first_row + done)
                done += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            lost = f"rows {first_row + done} to {first_row + rows[group] - 1} (row group {group}) cannot be read"
            yield Reject(shard.name, "", Reason.SHARD_DAMAGED, f"{lost}: {error}")
        first_row += rows[group]
