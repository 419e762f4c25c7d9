"""A folder that Hugging Face's `Dataset.save_to_disk` wrote (Arrow streams), as shards and rows.

state.json                  which files there are
data-00000-of-00001.arrow
dataset_dict.json           instead of these, where the folder holds several splits, each in a folder of its own
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.places import Place
from raymuse.storage.rejects import Reason, Reject
from raymuse.storage.rows import Picture, Reading, Shard
from raymuse.storage.table_files import TableFiles, Unopened
from raymuse.storage.table_rows import TableReader, choose_columns, is_damage

SPLITS, FILES = "dataset_dict.json", "state.json"
END_MARK = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


def is_saved(place: Place) -> bool:
    """Whether the folder was written by `save_to_disk`."""
    return SPLITS in place.files or FILES in place.files


def list_shards(place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
    """Runs of record batches of local files, which are mapped into memory; a remote file is one shard.

    Raises:
        UserError: the split or a column is missing, no file can be read, or none has a row.
    """
    folder = _split_folder(place, reading.split)
    names = [str(file["filename"]) for file in _read_list(sources.join(folder, FILES), "_data_files")]
    files = TableFiles(place.address, folder, names)
    return files.shards("arrow", lambda address: _block_rows(address, reading), images_per_shard)


def read_shard(shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
    """The rows of a run of record batches; what a damaged file lost is one Reject."""
    try:
        with _opened(shard.address) as stream:
            columns = choose_columns(stream.schema, reading, shard.address)
            reader = TableReader.of_file(shard, columns, reading)
            row = 0
            for number, batch in enumerate(_batches(stream, shard)):
                if isinstance(batch, Reject):
                    yield batch
                    return
                if shard.blocks is None or number >= shard.blocks.start:
                    yield from reader.rows(batch, row)
                row += batch.num_rows
    except Unopened as error:
        yield Reject(shard.name, "", Reason.SHARD_UNREADABLE, str(error))


def count_rows(shards: Sequence[Shard], reading: Reading) -> int:
    """Exact for local files; remote ones are estimated by the first that has rows, scaled by bytes."""
    known = sum(shard.blocks.rows for shard in shards if shard.blocks)
    remote = [shard for shard in shards if shard.blocks is None and sources.local_path(shard.address) is None]
    for shard in remote:
        if count := _count(shard):
            sizes = [sources.size_of(other.address) for other in remote]
            return known + round(count * sum(sizes) / sources.size_of(shard.address))
    return known


@contextmanager
def _opened(address: str) -> Iterator[pa.RecordBatchStreamReader]:
    """Raises Unopened, or OSError where trying again may help."""
    source = None
    path = sources.local_path(address)
    try:
        source = sources.open_in_parts(address) if path is None else pa.memory_map(str(path))
        stream = pa.ipc.open_stream(source)
    except (OSError, pa.ArrowException) as error:
        damaged = is_damage(error) and (path is not None or source is not None)  # else it is the store that refuses
        if source is not None:
            source.close()
        if damaged or (isinstance(error, OSError) and sources.is_final(error, address)):
            raise Unopened(f"{address} cannot be read as an Arrow stream: {error}") from error
        raise
    with source, stream:
        yield stream


def _batches(stream: pa.RecordBatchStreamReader, shard: Shard) -> Iterator[pa.RecordBatch | Reject]:
    """The batches of the file up to the shard's last; a Reject where it breaks off before."""
    row = number = 0
    while shard.blocks is None or number < shard.blocks.stop:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            if shard.blocks is not None or not _has_end_mark(shard.address):
                detail = f"the file ends after {row} rows without the mark of its end"
                yield Reject(shard.name, "", Reason.TRUNCATED, detail)
            return
        except (OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            detail = f"row {row} and what follows cannot be read: {error}"
            yield Reject(shard.name, "", Reason.SHARD_DAMAGED, detail)
            return
        yield batch
        row += batch.num_rows
        number += 1


def _block_rows(address: str, reading: Reading) -> list[int] | None:
    """How many rows each record batch of a local file has; None for a remote one, whose batches take a download.

    A batch of 0 rows at the end stands for the place where the file breaks off.

    Raises:
        Unopened; UserError where a column is missing.
    """
    with _opened(address) as stream:
        choose_columns(stream.schema, reading, address)
        if sources.local_path(address) is None:
            return None
        rows: list[int] = []
        whole = _has_end_mark(address)
        try:
            for batch in stream:
                rows.append(batch.num_rows)
        except (OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            whole = False
    if not whole and not sum(rows):
        raise Unopened(f"{address} breaks off before its first row")
    return rows if whole else [*rows, 0]


def _has_end_mark(address: str) -> bool:
    start = max(0, sources.size_of(address) - len(END_MARK))
    return sources.read_span(address, start, len(END_MARK)) == END_MARK


def _count(shard: Shard) -> int:
    try:
        with _opened(shard.address) as stream:
            return sum(batch.num_rows for batch in _batches(stream, shard) if not isinstance(batch, Reject))
    except Unopened:
        return 0


def _split_folder(place: Place, split: str) -> str:
    """The folder of the split. Raises UserError where there is no such split."""
    if SPLITS not in place.files:
        return place.folder
    splits = _read_list(place.within(SPLITS), "splits")
    if split not in splits:
        there = ", ".join(map(str, splits)) or "none"
        raise UserError(f"{place.address} has no split {split!r}; it has {there}. Name one: split=...")
    return place.within(split)


def _read_list(address: str, name: str) -> list[Any]:
    """A list in one of the small files. Raises UserError where it is not there."""
    try:
        values = json.loads(sources.read_bytes(address))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{address} is not as `Dataset.save_to_disk` writes it ({type(error).__name__}: {error}). Save it again."
        ) from error
    return list(values)
