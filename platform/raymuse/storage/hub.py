"""Data sets of the Hugging Face Hub, streamed by the `datasets` library (extra `hf`), as shards and rows.

A shard of the plan is a shard of the data set, which is mostly a file of its repository. Pictures are not decoded.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from raymuse.config.errors import UserError
from raymuse.storage.places import Place
from raymuse.storage.rejects import Reject
from raymuse.storage.rows import Picture, Reading, Shard
from raymuse.storage.table_rows import ROWS_AT_ONCE, TableReader, choose_columns

_ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?")
_ELSEWHERE = "or download the data set where that is possible and give its folder"


def is_data_set(address: str) -> bool:
    """Whether the address is `hf://datasets/OWNER/NAME`, with `@REVISION` or without; deeper ones are files."""
    return _ADDRESS.fullmatch(address) is not None


def list_shards(place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
    """One shard a shard of the data set.

    Args:
        place: whose address is `hf://datasets/OWNER/NAME`, or a local folder that `datasets` can stream.

    Raises:
        UserError: `datasets` is not installed, the data set cannot be reached, or it lacks the split or a column.
    """
    try:
        data = open_data_set(place.address, reading.split)
        if data.features is not None:
            choose_columns(data.features.arrow_schema, reading, place.address)
        count = int(data.num_shards)
    except UserError:
        raise
    except Exception as error:  # those of the library, the hub and the network share no base
        said = " ".join(str(error).split())
        raise UserError(
            f"{place.address} (split {reading.split}) cannot be opened: {type(error).__name__}: {said}. Check the "
            f"name, the split and the network, {_ELSEWHERE}."
        ) from error
    return [Shard(_stem(number, reading), place.address, "hub", piece=(number, count)) for number in range(count)]


def read_shard(shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
    """The rows of one shard of the data set. Raises what the library raises where the network fails."""
    assert shard.piece is not None
    number, count = shard.piece
    data = open_data_set(shard.address, reading.split)
    if data.num_shards != count:
        raise UserError(
            f"{shard.address} had {count} shards when the plan was made and now has {data.num_shards}. "
            "Start again with another output, and with a revision: hf://datasets/OWNER/NAME@REVISION."
        )
    reader = None
    row = 0
    for table in data.shard(num_shards=count, index=number).with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        if reader is None:
            columns = choose_columns(table.schema, reading, shard.address)
            reader = TableReader(columns, reading, shard.name, shard.address, _stem(number, reading))
        for batch in table.to_batches():
            yield from reader.rows(batch, row)
            row += batch.num_rows


def count_rows(shards: Sequence[Shard], reading: Reading) -> None:
    """Not known before they are read."""


def open_data_set(address: str, split: str) -> Any:
    """The `datasets.IterableDataset` of an address, or of a folder, with pictures as {bytes, path}.

    Raises:
        UserError: `datasets` is not installed. Else whatever `datasets.load_dataset` raises.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f'{address} needs the package `datasets` ({error}): pip install "raymuse[hf]", {_ELSEWHERE}.'
        ) from error
    match = _ADDRESS.fullmatch(address)
    name, revision = (match[1], match[2]) if match else (address, None)
    data = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
    for column, feature in (data.features or {}).items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return data


def _stem(number: int, reading: Reading) -> str:
    """Names a shard, and begins the keys of its rows, which must not depend on what else the plan reads."""
    return f"{reading.split}-{number:05d}"
