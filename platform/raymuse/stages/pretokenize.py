"""Captioned pictures to token shards on Ray Data, exactly once.

    plan: one part a shard -> decode (CPU) -> encode (actors) -> write (CPU) -> join a part, when its chunks are there

A row between the steps is a chunk: fixed in size and order, so that a part has the same bytes whatever ran when.
"""

import hashlib
import io
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from raymuse.clusters.quiet import quiet_data
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import Chunk, decode_chunks, reading_of
from raymuse.encoding.encoder import ChunkEncoder, code_agreement
from raymuse.encoding.hashes import find_duplicates
from raymuse.encoding.tasks import decode_row, hash_row, write_row
from raymuse.models.text import text_length
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import tokenizer_sha256, weights_sha256
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard, estimate_rows, list_shards
from raymuse.storage.manifest import Manifest, PartRecord
from raymuse.storage.rejects import Reason, Reject, to_table
from raymuse.storage.token_parts import (
    CHUNKS,
    HASHES,
    TABLES,
    MadePart,
    hashes_file,
    join_part,
    read_table,
    remove_chunks,
    tagged,
)
from raymuse.storage.tokens import EMPTY, parquet_bytes
from raymuse.tracking.run import Run

WRITE_CPUS = 0.5
RETRIES = 3
WRITERS = 2  # tasks an encoder that write its chunks
DECODE_CPUS = 0.9  # not 1: Ray Data fuses steps of equal demands, and decoding would then wait for the encoder
TRIED_SHARDS = 3  # where the first has no picture that can be used
SAME_CODES = 0.99  # share of ids that a lower precision must share with fp32
DUPLICATES = "duplicates.parquet"

Drops = dict[str, dict[str, Reject]]  # part -> key -> why


def pretokenize(config: PretokenizeConfig, run: Run) -> str:
    """Write token shards and return their folder. Needs Ray.

    Raises:
        UserError: for input, encoders or output that cannot work, before anything is written.
        TooManyRejects: after the end, where more rows were faulty than the config allows.
    """
    plan = plan_of(config)
    facts = fingerprint(config)
    _check_places(config)
    manifest = Manifest.open(config.output, {**config.identity(), **facts, "shards": _digest(plan.values())})
    if not manifest.finished:
        _prepare_data()
        run.params({**config.model_dump(mode="json"), **facts})
        _write_empty(manifest, config, facts)
        pending = {name: plan[name] for name in manifest.pending(plan)}
        _check_room(manifest, config, pending)
        drops = _duplicates(manifest, config, plan, run)
        agreement = _agreement(config, plan, run)
        for record in _commits(manifest, config, pending, drops, facts, run):
            manifest.record(record)
        for scratch in (CHUNKS, HASHES):
            manifest.folder.remove(scratch)
        manifest.finish(**facts, **agreement, counts=_totals(manifest))
    manifest.release()
    _report(manifest, config, run)
    return config.output


def plan_of(config: PretokenizeConfig) -> dict[str, Shard]:
    """What becomes which part: a function of the input's names and the config alone."""
    shards = list_shards(config.inputs, images_per_shard=config.pictures_per_part, reading=reading_of(config))
    return {f"part-{number:06d}": shard for number, shard in enumerate(shards)}


def fingerprint(config: PretokenizeConfig) -> dict[str, Any]:
    """What decides the ids and states beside the config: the encoders' weights and sizes.

    Raises:
        UserError: for encoders that cannot be read, or do not fit the crops.
    """
    vqgan = Vqgan.load(config.vqgan)
    low = Vqgan.load(config.low_vqgan) if config.low_vqgan else vqgan
    for shape in config.shapes:
        for name, sides, network in (("crop", shape, vqgan), ("low-resolution twin", config.low_shape(shape), low)):
            if sides is not None and any(side % network.factor for side in sides):
                raise UserError(
                    f"a {name} of {sides[0]} x {sides[1]} pixels is no multiple of the VQGAN's factor "
                    f"{network.factor}: change resolution, low_resolution or buckets."
                )
    return {
        "vqgan_sha256": weights_sha256(config.vqgan, "vqvae"),
        "low_vqgan_sha256": weights_sha256(config.low_vqgan, "vqvae") if config.low_vqgan else None,
        "text_encoder_sha256": weights_sha256(config.text_encoder, "text_encoder"),
        "codebook_size": vqgan.codes,
        "low_codebook_size": low.codes,
        "tokenizer_sha256": tokenizer_sha256(config.text_encoder),
        "text_length": text_length(config.text_encoder, config.text_length),
    }


# --- what can be checked before work begins


def _check_places(config: PretokenizeConfig) -> None:
    """Raise UserError where workers would not see what the driver sees, or what they need is not there to wait for."""
    for address in (config.output, *config.inputs):
        if address.startswith("memory://"):
            raise UserError(f"{address} is in the memory of one process, and the work is done by several.")
        relative = "://" not in address and not address.startswith("/")
        if relative and len([node for node in ray.nodes() if node["Alive"]]) > 1:
            raise UserError(f"{address} is a relative path, and the cluster has several machines: give a shared one.")
    there = ray.cluster_resources()
    encoders = config.min_encoders or config.encoders
    if config.gpus_per_encoder > there.get("GPU", 0.0):
        print(
            f"warning: encoders ask for {config.gpus_per_encoder:g} GPU each and the cluster has "
            f"{there.get('GPU', 0.0):g} now: the work waits for machines with GPUs, or set gpus_per_encoder=0.",
            file=sys.stderr,
        )
    if config.gpus_per_encoder == 0 and encoders + DECODE_CPUS + WRITE_CPUS > there.get("CPU", 0.0):
        print(
            f"warning: {encoders} encoders and a decoder ask for more than the {there.get('CPU', 0.0):g} CPUs that "
            "there are: the work waits for more machines, or lower encoders (or min_encoders).",
            file=sys.stderr,
        )


def _check_room(manifest: Manifest, config: PretokenizeConfig, pending: Mapping[str, Shard]) -> None:
    """Raise UserError where a local disk cannot hold what is to come: ids, and the captions' states."""
    rows = estimate_rows(list(pending.values()), reading_of(config)) or 0
    cells = max(height * width for height, width in config.shapes) // Vqgan.load(config.vqgan).factor ** 2
    crops = config.crops_per_picture * (2 if config.flip else 1)
    caption = len(manifest.folder.read(f"captions/{EMPTY}.parquet"))
    manifest.folder.require_free(rows * (2 * cells * crops + caption))


def _prepare_data() -> None:
    """Ray Data without bars, and with patience: a store that fails once must not end a job of days.

    A retried decode repeats its chunks exactly, and Ray skips those that it had already.
    """
    quiet_data()
    context = DataContext.get_current()
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    context.actor_init_retry_on_errors, context.max_consecutive_actor_init_deaths = True, RETRIES


# --- the plan as text


def plan_text(config: PretokenizeConfig) -> str:
    """The plan as text (`--dry-run`): parts, rows, bytes; time and cost as one chunk, tried here, foretells them."""
    fingerprint(config)
    plan = plan_of(config)
    shards = list(plan.values())
    rows = estimate_rows(shards, reading_of(config))
    decode, encode, crops, size = _trial(config, shards[0])
    lines = [
        f"{len(plan)} parts, one a shard: {shards[0].name} ... {shards[-1].name}",
        f"{config.decoders} decoders, {config.encoders} encoders, chunks of {config.chunk_size}",
        f"tried here on {crops} crops of the first shard: decoding {crops / decode:,.1f} crops/s a decoder, "
        f"encoding {crops / encode:,.1f} crops/s an encoder; a crop with its captions takes {size:,.0f} bytes",
    ]
    if config.buckets:
        lines.append("buckets: training cannot read crops of several shapes yet")
    if rows is None:
        return "\n".join([*lines, "how many rows there are is not known before they are read"])
    total = rows * config.crops_per_picture * (2 if config.flip else 1)
    seconds = total * max(decode / config.decoders, encode / config.encoders) / crops
    cost = f", cost about {seconds / 3600 * config.price_per_hour:,.2f}" if config.price_per_hour else ""
    return "\n".join(
        [
            *lines,
            f"about {rows:,} pictures, {total:,} crops, {total * size / 2**30:,.2f} GiB",
            f"time about {_duration(seconds)} on machines like this one{cost}",
        ]
    )


def _trial(config: PretokenizeConfig, shard: Shard) -> tuple[float, float, int, float]:
    """Seconds to decode and to encode a chunk of a shard, its crops, and stored bytes a crop.

    The second chunk, since the first waits for the shard to be opened; on one thread, as an encoder of a CPU has.
    """
    if config.gpus_per_encoder > 0 and not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU to try an encoder on: run the plan where one is, or with gpus_per_encoder=0."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if config.gpus_per_encoder == 0 else threads)
    try:
        encoder = ChunkEncoder(config, _device(config))
        began = time.perf_counter()
        for chunk in decode_chunks(shard, config):
            decoded = time.perf_counter() - began
            if chunk.number > 0 or chunk.last:
                break
            began = time.perf_counter()
        if not chunk.facts:
            raise UserError(f"{shard.name}: no picture of the first shard can be used: there is nothing to plan from.")
        encoder(chunk)  # the first call warms up
        began = time.perf_counter()
        encoded = encoder(chunk)
        seconds = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    stored = sum(len(parquet_bytes(getattr(encoded, table), {})) for table in ("tokens", "captions"))
    return decoded, seconds, len(chunk.facts), stored / len(chunk.facts)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


# --- what is written once a data set


def _write_empty(manifest: Manifest, config: PretokenizeConfig, facts: Mapping[str, Any]) -> None:
    """The empty caption, once a data set: what dropped captions become."""
    if manifest.pending([EMPTY]):
        table = ray.get(_encode_empty.options(num_gpus=config.gpus_per_encoder or None).remote(config))
        data = parquet_bytes(table, tagged(facts))
        manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": data}, rows=0, rejects=0, source="")


@ray.remote(num_cpus=1)
def _encode_empty(config: PretokenizeConfig) -> pa.Table:
    return ChunkEncoder(config, _device(config)).captions([""])


def _agreement(config: PretokenizeConfig, plan: Mapping[str, Shard], run: Run) -> dict[str, float]:
    """Share of ids that the config's precision and fp32 agree on, measured on the first chunk of the plan."""
    if config.precision == "fp32":
        return {}
    first = list(plan.values())[:TRIED_SHARDS]
    share = ray.get(_measure.options(num_gpus=config.gpus_per_encoder or None).remote(config, first))
    if share is None:
        return {}
    run.metrics({"code_agreement": share}, 0)
    print(f"{config.precision} and fp32 give the same id for {share:.2%} of the cells of the first chunk", flush=True)
    if share < SAME_CODES:
        print(f"warning: less than {SAME_CODES:.0%}; precision=fp32 is exact.", file=sys.stderr)
    return {"code_agreement": share}


@ray.remote(num_cpus=1)
def _measure(config: PretokenizeConfig, shards: list[Shard]) -> float | None:
    """None where no shard has a picture that can be used."""
    for shard in shards:
        for chunk in decode_chunks(shard, config):
            if chunk.facts:
                return code_agreement(config, chunk, _device(config))
    return None


def _duplicates(manifest: Manifest, config: PretokenizeConfig, plan: Mapping[str, Shard], run: Run) -> Drops:
    """Which pictures to leave out because an earlier one shows the same: found once, over the whole plan."""
    if config.duplicates == "keep":
        return {}
    if not manifest.folder.exists(DUPLICATES):
        _hash_all(manifest.folder, config, plan)
        found = find_duplicates(
            ((name, shard.name, read_table(manifest.folder, hashes_file(name))) for name, shard in plan.items()),
            config.near_duplicates,
        )
        rows = [(part, reject) for part, keys in found.items() for reject in keys.values()]
        table = to_table(reject for _, reject in rows).add_column(
            0, "part", pa.array([p for p, _ in rows], pa.string())
        )
        manifest.folder.write(DUPLICATES, parquet_bytes(table, {}))
    table = pq.read_table(io.BytesIO(manifest.folder.read(DUPLICATES)))
    reasons = Counter(table["reason"].to_pylist())
    run.metrics({f"found/{reason}": float(count) for reason, count in reasons.items()}, 0)
    found_text = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    print(f"duplicates: {found_text} ({'dropped' if config.duplicates == 'drop' else 'counted only'})", flush=True)
    drops: Drops = {}
    if config.duplicates == "drop":
        for row in table.to_pylist():
            reject = Reject(row["source"], row["key"], Reason(row["reason"]), row["detail"])
            drops.setdefault(row["part"], {})[row["key"]] = reject
    return drops


def _hash_all(folder: Folder, config: PretokenizeConfig, plan: Mapping[str, Shard]) -> None:
    there = set(folder.names("_hashes"))
    rows = [
        {"part": name, "shard": pickle.dumps(shard)}
        for name, shard in plan.items()
        if hashes_file(name).rpartition("/")[2] not in there
    ]
    if not rows:
        return
    hashed = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        hash_row,
        batch_size=1,
        compute=TaskPoolStrategy(size=min(config.decoders, len(rows))),
        num_cpus=DECODE_CPUS,
        fn_kwargs={"config": config, "output": folder.address},
    )
    for number, _ in enumerate(hashed.iter_rows(), 1):
        print(f"looked for duplicates in {number} of {len(rows)} shards", flush=True)


# --- the parts


def _commits(
    manifest: Manifest,
    config: PretokenizeConfig,
    pending: Mapping[str, Shard],
    drops: Drops,
    facts: Mapping[str, Any],
    run: Run,
) -> Iterator[PartRecord]:
    """Stream the pending shards through decode and encode; a part is joined as soon as its last chunk is there."""
    if not pending:
        return
    rows = [{"part": name, "shard": pickle.dumps((shard, drops.get(name, {})))} for name, shard in pending.items()]
    encoded = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map_batches(
            decode_row,
            batch_size=1,
            compute=TaskPoolStrategy(size=min(config.decoders, len(rows))),
            num_cpus=DECODE_CPUS,
            fn_kwargs={"config": config},
        )
        .map_batches(
            _Encode,
            batch_size=1,
            compute=ActorPoolStrategy(min_size=config.min_encoders or config.encoders, max_size=config.encoders),
            num_gpus=config.gpus_per_encoder or None,
            fn_constructor_kwargs={"config": config},
        )
        .map_batches(
            write_row,
            batch_size=1,
            compute=TaskPoolStrategy(size=min(WRITERS * config.encoders, len(rows))),
            num_cpus=WRITE_CPUS,
            fn_kwargs={"output": manifest.folder.address},
        )
    )
    join = ray.remote(num_cpus=WRITE_CPUS, max_retries=RETRIES, retry_exceptions=[OSError])(join_part)
    sweep = ray.remote(num_cpus=0)(remove_chunks)
    address, progress = manifest.folder.address, Progress(len(pending), run)
    coming: dict[str, MadePart] = {}
    joining: list[ray.ObjectRef] = []
    sweeping: list[ray.ObjectRef] = []

    def through(ready: list[ray.ObjectRef]) -> Iterator[PartRecord]:
        for record in progress.through(ray.get(ready)):
            yield record
            sweeping.append(sweep.remote(address, record.name))

    for row in encoded.iter_rows():
        part = str(row["part"])
        if coming.setdefault(part, MadePart()).add(row):
            made, source = coming.pop(part), pending[part].name
            joining.append(join.remote(address, part, made, source, facts, bool(config.buckets)))
        ready, joining = ray.wait(joining, num_returns=len(joining), timeout=0) if joining else ([], [])
        yield from through(ready)
    while joining:
        ready, joining = ray.wait(joining)
        yield from through(ready)
    ray.get(sweeping)


class _Encode:
    """A chunk to its tables, and what is known of it."""

    def __init__(self, config: PretokenizeConfig) -> None:
        self.encoder = ChunkEncoder(config, _device(config))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        chunk = pickle.loads(batch["chunk"][0])
        assert isinstance(chunk, Chunk)
        encoded = self.encoder(chunk)
        return {
            "part": batch["part"],
            "chunk": [chunk.number],
            "shape": ["x".join(map(str, chunk.shape))],
            "crops": [len(encoded.tokens)],
            "noticed": [pickle.dumps((encoded.counts, encoded.truncated))],
            "last": [chunk.last],
            "tables": [pickle.dumps({table: getattr(encoded, table) for table in TABLES})],
        }


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


# --- the end


def _totals(manifest: Manifest) -> dict[str, float]:
    """Every count of the parts, summed: pictures, captions, rejects by reason, what was mended."""
    totals: Counter[str] = Counter()
    for part in manifest.done.values():
        totals.update(part.counts)
    return dict(sorted(totals.items()))


def _report(manifest: Manifest, config: PretokenizeConfig, run: Run) -> None:
    """The counts to the terminal and MLflow, and exit code 3 where too much was faulty."""
    totals = _totals(manifest)
    sums = [file.sha256 for record in manifest.done.values() for file in record.files]
    run.dataset("token shards", _digest(sums), config.output, "pretokenize")
    run.metrics({f"total/{name}": count for name, count in totals.items()}, len(manifest.done))
    for name, count in totals.items():
        print(f"  {name}: {count:,.0f}", flush=True)
    faults = filtered = 0.0
    for name, count in totals.items():
        kind, _, reason = name.partition("/")
        if kind == "rejects":
            faults, filtered = (faults, filtered + count) if Reason(reason).is_filter else (faults + count, filtered)
    inputs = faults + filtered + totals.get("pictures", 0)
    unreadable = int(totals.get(f"rejects/{Reason.SHARD_UNREADABLE}", 0))
    if unreadable > config.max_reject_fraction * len(manifest.done):  # one row each, and perhaps thousands of pictures
        raise TooManyRejects(unreadable, len(manifest.done) - 1, f"{config.output}/rejects")
    if not totals.get("pictures"):
        print(f"warning: no picture is left in {config.output}: see its rejects folder.", file=sys.stderr)
    if faults > config.max_reject_fraction * max(1, inputs):
        raise TooManyRejects(int(faults), int(inputs), f"{config.output}/rejects")


def _device(config: PretokenizeConfig) -> str:
    return "cuda" if config.gpus_per_encoder > 0 else "cpu"


def _digest(things: Iterable[str | Shard]) -> str:
    """A short sum. Of a shard all counts but its address, since data may move: name, members, captions, rows."""
    total = hashlib.sha256()
    for thing in things:
        total.update(repr(replace(thing, address="") if isinstance(thing, Shard) else thing).encode() + b"\n")
    return total.hexdigest()[:16]
