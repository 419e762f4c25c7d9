"""Captioned pictures to token shards on Ray Data, exactly once.

plan: one part a shard            encoding/plan.py
duplicates, where asked for       tokenizing/duplicates.py
chunks through to parts           tokenizing/stream.py
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from PIL import Image

from raymuse.clusters.placement import encoding_task
from raymuse.clusters.quiet import quiet_data
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import decode_chunks, reading_of
from raymuse.encoding.encoder import CaptionEncoder, code_agreement
from raymuse.encoding.plan import fingerprint, plan_of
from raymuse.encoding.tasks import DECODE_CPUS, WRITE_CPUS
from raymuse.encoding.token_sheet import token_entries
from raymuse.models.vqgan import Vqgan
from raymuse.storage.contact_sheet import sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.images import Shard, estimate_rows
from raymuse.storage.manifest import Manifest, read_records
from raymuse.storage.rejects import Reason
from raymuse.storage.token_parts import CHUNKS, HASHES, tagged
from raymuse.storage.token_survey import survey_tokens
from raymuse.storage.tokens import EMPTY, parquet_bytes
from raymuse.tokenizing.data_context import stage_data
from raymuse.tokenizing.duplicates import search
from raymuse.tokenizing.stream import commits
from raymuse.tracking.run import Run

TRIED_SHARDS = 3  # where the first has no picture that can be used
SHOWN = 24  # crops that the run shows as pictures
SAME_CODES = 0.99  # share of ids that a lower precision must share with fp32


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
        run.params({**config.model_dump(mode="json"), **facts})
        _write_empty(manifest, config, facts)
        pending = {name: plan[name] for name in manifest.pending(plan)}
        _check_room(manifest, config, pending)
        agreement = _agreement(config, plan, run)
        quiet_data()
        with stage_data(config):
            drops = search(manifest.folder, config, plan, run)
            for record in commits(manifest.folder, config, pending, drops, facts, run):
                manifest.record(record)
        for scratch in (CHUNKS, HASHES):
            manifest.folder.remove(scratch)
        manifest.finish(**facts, **agreement, counts=_totals(manifest))
        if run.id is not None and (sheet := _on_encoder(_look, config, facts)):
            run.picture("tokens as pictures", sheet, 0)
    manifest.release()
    _report(manifest, config, run)
    return config.output


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


# --- what is written once a data set


def _write_empty(manifest: Manifest, config: PretokenizeConfig, facts: Mapping[str, Any]) -> None:
    """The empty caption, once a data set: what dropped captions become."""
    if manifest.pending([EMPTY]):
        table = _on_encoder(_encode_empty, config)
        data = parquet_bytes(table, tagged(facts))
        manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": data}, rows=0, rejects=0, source="")


def _on_encoder(function: Callable[..., Any], config: PretokenizeConfig, *arguments: Any) -> Any:
    """What it returns where encoders run: the driver needs neither torch nor a GPU."""
    return ray.get(encoding_task(function, config.gpus_per_encoder).remote(config, *arguments))


def _encode_empty(config: PretokenizeConfig) -> pa.Table:
    return CaptionEncoder(config, config.device)([""])


def _agreement(config: PretokenizeConfig, plan: Mapping[str, Shard], run: Run) -> dict[str, float]:
    """Share of ids that the config's precision and fp32 agree on, measured on the first chunk of the plan."""
    if config.precision == "fp32":
        return {}
    first = list(plan.values())[:TRIED_SHARDS]
    share = _on_encoder(_measure, config, first)
    if share is None:
        return {}
    run.metrics({"code_agreement": share}, 0)
    print(f"{config.precision} and fp32 give the same id for {share:.2%} of the cells of the first chunk", flush=True)
    if share < SAME_CODES:
        print(f"warning: less than {SAME_CODES:.0%}; precision=fp32 is exact.", file=sys.stderr)
    return {"code_agreement": share}


def _measure(config: PretokenizeConfig, shards: list[Shard]) -> float | None:
    """None where no shard has a picture that can be used."""
    for shard in shards:
        for chunk in decode_chunks(shard, config):
            if chunk.facts:
                return code_agreement(config, chunk, config.device)
    return None


# --- the end


def _look(config: PretokenizeConfig, facts: Mapping[str, Any]) -> Image.Image | None:
    """Some rows of the first part that has any, decoded again; None where there is none."""
    folder = Folder(config.output)
    filled = [record for record in read_records(folder).values() if record.rows]
    if not filled:
        return None
    codes = (int(facts["codebook_size"]), facts.get("low_codebook_size") if config.low_resolution else None)
    found = survey_tokens(folder, filled[:1], codes, int(facts["text_length"]), range(min(SHOWN, filled[0].rows))).rows
    vqgan = Vqgan.load(config.vqgan, device=config.device)
    entries, kinds = token_entries(vqgan, found, facts.get("low_vqgan_sha256") in (None, facts["vqgan_sha256"]))
    return sheet_png(entries, kinds, f"{len(entries)} of {filled[0].rows} crops of {filled[0].name}, decoded")


def _totals(manifest: Manifest) -> dict[str, float]:
    """Every count of the parts, summed: pictures, captions, rejects by reason, what was mended."""
    totals: Counter[str] = Counter()
    for part in manifest.done.values():
        totals.update(part.counts)
    return dict(sorted(totals.items()))


def _report(manifest: Manifest, config: PretokenizeConfig, run: Run) -> None:
    """The counts to the terminal and MLflow, and exit code 3 where too much was faulty."""
    totals = _totals(manifest)
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


def _digest(things: Iterable[str | Shard]) -> str:
    """A short sum. Of a shard all counts but its address, since data may move: name, members, captions, rows."""
    total = hashlib.sha256()
    for thing in things:
        total.update(repr(replace(thing, address="") if isinstance(thing, Shard) else thing).encode() + b"\n")
    return total.hexdigest()[:16]
