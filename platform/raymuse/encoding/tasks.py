"""What Ray Data's tasks run on CPUs, as functions of one-row batches. Imports no torch: a worker starts in a second."""

import pickle
from collections.abc import Iterator
from typing import Any

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import decode_chunks
from raymuse.storage.folder import Folder
from raymuse.storage.token_parts import chunk_file, hashes_file, write_table

DECODE_CPUS = 0.9  # not 1: Ray Data fuses steps of equal demands, and decoding would then wait for the encoder
WRITE_CPUS = 0.5


def decode_row(batch: dict[str, Any], config: PretokenizeConfig) -> Iterator[dict[str, Any]]:
    """A shard to its chunks, each a row of its own."""
    shard, drop = pickle.loads(batch["shard"][0])
    for chunk in decode_chunks(shard, config, drop):
        yield {"part": [batch["part"][0]], "chunk": [pickle.dumps(chunk)]}


def write_row(batch: dict[str, Any], output: str) -> dict[str, Any]:
    """A chunk's tables to the output's scratch folder, under names that the plan gives; only what is known goes on."""
    folder, part, number = Folder(output), str(batch["part"][0]), int(batch["chunk"][0])
    for name, table in pickle.loads(batch["tables"][0]).items():
        write_table(folder, chunk_file(part, number, name), table)
    return {name: column for name, column in batch.items() if name != "tables"}


def hash_row(batch: dict[str, Any], config: PretokenizeConfig, output: str) -> dict[str, Any]:
    """A shard to the hashes of its pictures, written beside the parts."""
    from raymuse.encoding.hashes import hash_shard  # scipy, which no other task needs

    part = str(batch["part"][0])
    write_table(Folder(output), hashes_file(part), hash_shard(pickle.loads(batch["shard"][0]), config))
    return {"part": [part]}
