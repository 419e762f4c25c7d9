"""The stream of chunks into parts on Ray Data: decode (CPU) -> encode (actors) -> write (CPU) -> join a part (CPU)."""

import pickle
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from raymuse.clusters.placement import place
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import Chunk
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.encoding.tasks import DECODE_CPUS, WRITE_CPUS, decode_row, write_row
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard
from raymuse.storage.manifest import PartRecord
from raymuse.storage.token_parts import TABLES, MadePart, join_part, remove_chunks
from raymuse.tokenizing.data_context import RETRIES
from raymuse.tokenizing.duplicates import Drops
from raymuse.tracking.run import Run

WRITERS = 2  # tasks an encoder that write its chunks


def commits(
    folder: Folder,
    config: PretokenizeConfig,
    pending: Mapping[str, Shard],
    drops: Drops,
    facts: Mapping[str, Any],
    run: Run,
) -> Iterator[PartRecord]:
    """Stream the pending shards through decode and encode; a part is joined as soon as its last chunk is there."""
    if not pending:
        return
    progress, joining = Progress(len(pending), run), _Joining(folder.address, facts, bool(config.buckets))
    coming: dict[str, MadePart] = {}
    for row in _encoded(folder, config, pending, drops).iter_rows():
        part = str(row["part"])
        progress.tokens += int(row["ids"])
        if coming.setdefault(part, MadePart()).add(row):
            joining.begin(part, coming.pop(part), pending[part].name)
        yield from joining.swept(progress.through(joining.ready()))
    while joining.running:
        yield from joining.swept(progress.through(joining.ready(wait=True)))
    ray.get(joining.sweeping)


def _encoded(folder: Folder, config: PretokenizeConfig, pending: Mapping[str, Shard], drops: Drops) -> ray.data.Dataset:
    """What is known of every chunk, a row each, once its tables lie in the folder."""
    rows = [{"part": name, "shard": pickle.dumps((shard, drops.get(name, {})))} for name, shard in pending.items()]
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode_row,
            batch_size=1,
            compute=TaskPoolStrategy(size=min(config.decoders, len(rows))),
            num_cpus=DECODE_CPUS,
            label_selector=place("decode", gpus=0),
            fn_kwargs={"config": config},
        )
        .map_batches(
            _Encode,
            batch_size=1,
            compute=ActorPoolStrategy(min_size=config.min_encoders or config.encoders, max_size=config.encoders),
            num_gpus=config.gpus_per_encoder or None,
            label_selector=place("encode", config.gpus_per_encoder),
            fn_constructor_kwargs={"config": config},
        )
        .map_batches(
            write_row,
            batch_size=1,
            compute=TaskPoolStrategy(size=WRITERS * config.encoders),
            num_cpus=WRITE_CPUS,
            fn_kwargs={"output": folder.address},
        )
    )


class _Joining:
    """Tasks that join parts, and those that sweep up the chunks of parts that are recorded."""

    def __init__(self, address: str, facts: Mapping[str, Any], bucketed: bool) -> None:
        self.address, self.facts, self.bucketed = address, facts, bucketed
        self.running: list[ray.ObjectRef] = []
        self.sweeping: list[ray.ObjectRef] = []
        self._join = ray.remote(num_cpus=WRITE_CPUS, max_retries=RETRIES, retry_exceptions=[OSError])(join_part)
        self._sweep = ray.remote(num_cpus=0)(remove_chunks)

    def begin(self, part: str, made: MadePart, source: str) -> None:
        self.running.append(self._join.remote(self.address, part, made, source, self.facts, self.bucketed))

    def ready(self, wait: bool = False) -> list[PartRecord]:
        """Those that are joined by now; with `wait`, at least one."""
        if not self.running:
            return []
        count, timeout = (1, None) if wait else (len(self.running), 0)
        done, self.running = ray.wait(self.running, num_returns=count, timeout=timeout)
        return list(ray.get(done))

    def swept(self, records: Iterator[PartRecord]) -> Iterator[PartRecord]:
        """The same, each part's chunks being deleted when whoever takes its record has come back for the next."""
        for record in records:
            yield record
            self.sweeping.append(self._sweep.remote(self.address, record.name))


class _Encode:
    """A chunk to its tables, and what is known of it."""

    def __init__(self, config: PretokenizeConfig) -> None:
        self.encoder = ChunkEncoder(config, config.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunk = pickle.loads(batch["chunk"][0])
        assert isinstance(chunk, Chunk)
        encoded = self.encoder(chunk)
        return {
            "part": batch["part"],
            "chunk": [chunk.number],
            "shape": ["x".join(map(str, chunk.shape))],
            "crops": [len(encoded.tokens)],
            "ids": [_ids(encoded.tokens)],
            "noticed": [pickle.dumps((encoded.counts, encoded.truncated))],
            "last": [chunk.last],
            "tables": [pickle.dumps({table: getattr(encoded, table) for table in TABLES})],
        }


def _ids(tokens: pa.Table) -> int:
    """How many image ids a table of crops holds, those of low resolution among them."""
    columns = [tokens.schema.field(name) for name in ("image_ids", "low_ids") if name in tokens.column_names]
    return len(tokens) * sum(int(column.type.list_size) for column in columns)


class Progress:
    """Plain lines with rate and time left, and the same numbers to MLflow."""

    def __init__(self, parts: int, run: Run) -> None:
        self.parts, self.run = parts, run
        self.done = self.rows = self.rejects = self.tokens = 0
        self.began = time.perf_counter()

    def through(self, records: list[PartRecord]) -> Iterator[PartRecord]:
        for record in records:
            self.done += 1
            self.rows += record.rows
            self.rejects += record.rejects
            yield record
            self._say()

    def _say(self) -> None:
        seconds = time.perf_counter() - self.began
        rate, left = self.rows / seconds, seconds / self.done * (self.parts - self.done)
        counts = {"rows": self.rows, "tokens": self.tokens, "rejects": self.rejects, "queue": self.parts - self.done}
        self.run.metrics({**counts, "rows_per_second": rate}, self.done)
        print(
            f"part {self.done}/{self.parts}  {self.rows} rows  {self.rejects} rejects  {rate:.0f} rows/s  "
            f"{left:.0f} s left",
            flush=True,
        )
