"""Image shards to token shards on Ray Data, exactly once.

    plan: one part a shard -> decode (CPU tasks) -> encode (actors) -> commit (a part, when its chunks are there)

A row between the steps is a chunk: fixed in size and order, so that a part has the same bytes whatever ran when.
"""

import hashlib
import io
import pickle
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from raymuse.clusters.quiet import quiet_data
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import Chunk, decode_chunks
from raymuse.encoding.encoder import ChunkEncoder, Encoded
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import weights_sha256
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard, list_shards
from raymuse.storage.manifest import FileRecord, Manifest, PartRecord
from raymuse.storage.tokens import EMPTY, parquet_bytes
from raymuse.tracking.run import Run

TABLES = ("tokens", "captions", "rejects")
DECODE_CPUS = 0.9  # not 1: Ray Data fuses steps of equal demands, and decoding would then wait for the encoder


def pretokenize(config: PretokenizeConfig, run: Run) -> str:
    """Write token shards and return their folder. Needs Ray.

    Raises:
        UserError: for input, encoders or output that cannot work, before anything is written.
        TooManyRejects: after the end, where more rows were refused than the config allows.
    """
    shards = list_shards(config.input, images_per_shard=config.pictures_per_part)
    facts = fingerprint(config)
    manifest = Manifest.open(config.output, {**config.identity(), **facts, "shards": _digest(shards)})
    plan = {f"part-{number:06d}": shard for number, shard in enumerate(shards)}
    if not manifest.finished:
        run.params({**config.model_dump(mode="json"), **facts})
        _write_empty(manifest, config, facts)
        pending = manifest.pending(plan)
        for record in _commits(manifest, config, {name: plan[name] for name in pending}, facts, run):
            manifest.record(record)
        shutil.rmtree(f"{config.output}/_chunks", ignore_errors=True)
        manifest.finish(**facts)
    manifest.release()
    _report(manifest, config, run)
    return config.output


def plan_text(config: PretokenizeConfig) -> str:
    """The plan as text (`--dry-run`): parts, and what a row will weigh."""
    shards = list_shards(config.input, images_per_shard=config.pictures_per_part)
    vqgan, text = Vqgan.load(config.vqgan), TextEncoder.load(config.text_encoder)
    ids = 2 * (config.resolution // vqgan.factor) ** 2
    caption = 2 * (text.length * text.width + text.pooled_width) if config.text == "states" else 4 * text.length
    return (
        f"{len(shards)} parts, one a shard: {shards[0].name} ... {shards[-1].name}\n"
        f"a crop takes {ids} bytes of ids, a caption {caption:,} bytes ({config.text})\n"
        f"{config.decoders} decoders, {config.encoders} encoders, chunks of {config.chunk_size}"
    )


def fingerprint(config: PretokenizeConfig) -> dict[str, Any]:
    """What decides the ids and states beside the config: the encoders' weights and sizes.

    Raises:
        UserError: for encoders that cannot be read, or do not fit the resolutions.
    """
    vqgan = Vqgan.load(config.vqgan)
    low = Vqgan.load(config.low_vqgan) if config.low_vqgan else vqgan
    sides = (("resolution", config.resolution, vqgan), ("low_resolution", config.low_resolution, low))
    for name, side, network in sides:
        if side is not None and side % network.factor:
            raise UserError(f"{name}={side} is no multiple of the VQGAN's factor {network.factor}.")
    return {
        "vqgan_sha256": weights_sha256(config.vqgan, "vqvae"),
        "low_vqgan_sha256": weights_sha256(config.low_vqgan, "vqvae") if config.low_vqgan else None,
        "text_encoder_sha256": weights_sha256(config.text_encoder, "text_encoder"),
        "codebook_size": vqgan.codes,
        "low_codebook_size": low.codes,
        "text_length": TextEncoder.load(config.text_encoder).length,
    }


def _commits(
    manifest: Manifest, config: PretokenizeConfig, pending: dict[str, Shard], facts: dict[str, Any], run: Run
) -> Iterator[PartRecord]:
    """Stream the pending shards through decode and encode; a part is joined as soon as its last chunk is there."""
    if not pending:
        return
    quiet_data()
    rows = [{"part": name, "shard": pickle.dumps(shard)} for name, shard in pending.items()]
    encoded = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            _decode,
            batch_size=1,
            compute=TaskPoolStrategy(size=config.decoders),
            num_cpus=DECODE_CPUS,
            fn_kwargs={"config": config},
        )
        .map_batches(
            _Encode,
            batch_size=1,
            compute=ActorPoolStrategy(size=config.encoders),
            num_gpus=config.gpus_per_encoder or None,
            fn_constructor_kwargs={"config": config, "output": manifest.folder.address},
        )
    )
    progress = Progress(len(pending), run)
    arrived: dict[str, dict[int, bool]] = {}
    joining: list[ray.ObjectRef] = []
    for row in encoded.iter_rows():
        chunks = arrived.setdefault(row["part"], {})
        chunks[int(row["chunk"])] = bool(row["last"])
        if _complete(chunks):
            shard = pending[row["part"]]
            joining.append(_join.remote(manifest.folder.address, row["part"], len(chunks), shard.name, facts))
        ready, joining = ray.wait(joining, num_returns=len(joining), timeout=0) if joining else ([], [])
        yield from progress.through(ray.get(ready))
    while joining:
        ready, joining = ray.wait(joining)
        yield from progress.through(ray.get(ready))


def _decode(batch: dict[str, Any], config: PretokenizeConfig) -> Iterator[dict[str, Any]]:
    """A shard to its chunks, each a row of its own."""
    for chunk in decode_chunks(pickle.loads(batch["shard"][0]), config):
        yield {"part": [batch["part"][0]], "chunk": [pickle.dumps(chunk)]}


class _Encode:
    """A chunk to its tables, written beside the parts under names that the plan gives; only their numbers go on."""

    def __init__(self, config: PretokenizeConfig, output: str) -> None:
        device = "cuda" if config.gpus_per_encoder > 0 else "cpu"
        self.encoder = ChunkEncoder(config, device)
        self.folder = Folder(output)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part, chunk = batch["part"][0], pickle.loads(batch["chunk"][0])
        assert isinstance(chunk, Chunk)
        tables = self.encoder(chunk)
        for table in TABLES:
            self.folder.write(_chunk_file(part, chunk.number, table), _ipc(getattr(tables, table)))
        return {"part": [part], "chunk": [chunk.number], "last": [chunk.last]}


@ray.remote(num_cpus=0.5)
def _join(address: str, part: str, chunks: int, source: str, facts: dict[str, Any]) -> PartRecord:
    """Join a shard's chunks into its part and put its files in place."""
    folder = Folder(address)
    tables = {
        name: pa.concat_tables([_read_ipc(folder.read(_chunk_file(part, number, name))) for number in range(chunks)])
        for name in TABLES
    }
    return _put_part(folder, part, Encoded(**tables), source, facts)


def _put_part(folder: Folder, part: str, encoded: Encoded, source: str, facts: dict[str, Any]) -> PartRecord:
    tables = {"tokens": encoded.tokens, "captions": _unique(encoded.captions), "rejects": encoded.rejects}
    metadata = {"raymuse." + name: str(value) for name, value in facts.items()}
    files = []
    for name, table in tables.items():
        if len(table) == 0 and name != "captions":
            continue
        data = parquet_bytes(table, metadata)
        folder.write(f"{name}/{part}.parquet", data)
        files.append(FileRecord.of(f"{name}/{part}.parquet", data))
    for number in range(len(folder.names(f"_chunks/{part}")) // len(TABLES)):
        for name in TABLES:
            folder.remove(_chunk_file(part, number, name))
    keys = {key.as_py() for key in encoded.tokens["key"]} if len(encoded.tokens) else set()
    counts = {"pictures": float(len(keys)), "captions": float(len(tables["captions"]))}
    return PartRecord(part, len(encoded.tokens), len(encoded.rejects), source, files, counts)


def _write_empty(manifest: Manifest, config: PretokenizeConfig, facts: dict[str, Any]) -> None:
    """The empty caption, once a data set: what dropped captions become."""
    if manifest.pending([EMPTY]):
        gpus = config.gpus_per_encoder
        table = ray.get(_encode_empty.options(num_gpus=gpus or None).remote(config))
        data = parquet_bytes(table, {"raymuse." + name: str(value) for name, value in facts.items()})
        manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": data}, rows=0, rejects=0, source="")


@ray.remote(num_cpus=1)
def _encode_empty(config: PretokenizeConfig) -> pa.Table:
    return ChunkEncoder(config, "cuda" if config.gpus_per_encoder > 0 else "cpu").captions([""])


class Progress:
    """Plain lines with rate and time left, and the same numbers to MLflow."""

    def __init__(self, parts: int, run: Run) -> None:
        self.parts, self.run = parts, run
        self.done = self.rows = self.rejects = 0
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
        self.run.metrics({"rows": self.rows, "rejects": self.rejects, "rows_per_second": rate}, self.done)
        print(
            f"part {self.done}/{self.parts}  {self.rows} rows  {self.rejects} rejects  {rate:.0f} rows/s  "
            f"{left:.0f} s left",
            flush=True,
        )


def _report(manifest: Manifest, config: PretokenizeConfig, run: Run) -> None:
    """The data set to MLflow, and exit code 3 where too much was refused."""
    rejects = sum(part.rejects for part in manifest.done.values())
    pictures = int(sum(part.counts.get("pictures", 0) for part in manifest.done.values()))
    run.dataset("token shards", _digest(list(manifest.done)), config.output, "pretokenize")
    if rejects > config.max_reject_fraction * max(1, rejects + pictures):
        raise TooManyRejects(rejects, rejects + pictures, f"{config.output}/rejects")


def _complete(chunks: dict[int, bool]) -> bool:
    last = [number for number, is_last in chunks.items() if is_last]
    return bool(last) and len(chunks) == last[0] + 1


def _chunk_file(part: str, number: int, table: str) -> str:
    return f"_chunks/{part}/{number:06d}.{table}.arrow"


def _unique(captions: pa.Table) -> pa.Table:
    """The first row of every caption, in order."""
    first: dict[str, int] = {}
    for row, key in enumerate(captions["caption_id"].to_pylist()):
        first.setdefault(key, row)
    return captions.take(list(first.values())).combine_chunks()


def _digest(things: list[Any]) -> str:
    plain = [asdict(thing)["name"] if isinstance(thing, Shard) else str(thing) for thing in things]
    return hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]


def _ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _read_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
