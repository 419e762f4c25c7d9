"""Parts of a scoring on Ray Data: an actor makes a part's files, the driver records it; what is recorded is skipped."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from raymuse.clusters.placement import Work, place
from raymuse.clusters.quiet import quiet_data
from raymuse.scoring.collected import Collected, collect, total
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, Manifest, PartRecord

TOLD_EVERY = 10.0  # seconds
BLOCKS = 1000
CHUNK = 64  # parts whose features are added up by one task


def run_parts(
    manifest: Manifest,
    names: Sequence[str],
    actor: type,
    arguments: Mapping[str, Any],
    *,
    workers: int,
    gpus: float,
    what: str,
    work: Work | None = None,
) -> None:
    """Have the missing parts made, and record each as it is done.

    Args:
        names: of the parts, in the order of the plan.
        workers: actors; 0: this process does it, without Ray.
        actor: picklable callable; takes {"part": [name]} and returns {"record": [what `written` said]}.
        arguments: of its constructor.
        what: is told with the progress.
        work: where it runs on a cluster with roles; None: anywhere.
    """
    pending = manifest.pending(names)
    if not pending:
        return
    rows = _on_ray(pending, actor, arguments, workers, gpus, work) if workers else _here(pending, actor, arguments)
    told = began = time.monotonic()
    for number, record in enumerate(rows, 1):
        manifest.record(PartRecord.parse(json.loads(record)))
        now = time.monotonic()
        if now - told > TOLD_EVERY:
            left = (now - began) / number * (len(pending) - number)
            print(f"{what}: {number} of {len(pending)} parts, {left:.0f} s to go", flush=True)
            told = now


def _on_ray(
    pending: Sequence[str], actor: type, arguments: Mapping[str, Any], workers: int, gpus: float, work: Work | None
) -> Iterator[str]:
    quiet_data()
    where = {"label_selector": place(work, gpus)} if work is not None else {}
    made = ray.data.from_items(
        [{"part": name} for name in pending], override_num_blocks=min(len(pending), BLOCKS)
    ).map_batches(
        actor,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(workers, len(pending))),
        num_gpus=gpus or None,
        fn_constructor_kwargs=dict(arguments),
        **where,
    )
    return (row["record"] for row in made.iter_rows())


def _here(pending: Sequence[str], actor: type, arguments: Mapping[str, Any]) -> Iterator[str]:
    """In this process, without Ray."""
    work = actor(**arguments)
    return (work({"part": [name]})["record"][0] for name in pending)


def written(
    address: str, part: str, files: Mapping[str, bytes], rows: int, rejects: int = 0, source: str = "", **counts: float
) -> dict[str, list[str]]:
    """Put a part's files in place, and return the actor's answer: its record."""
    folder = Folder(address)
    for name, data in files.items():
        folder.write(name, data)
    records = [FileRecord.of(name, data) for name, data in files.items()]
    return {"record": [json.dumps(asdict(PartRecord(part, rows, rejects, source, records, counts)))]}


def collect_parts(address: str, parts: Sequence[str], keep: int, workers: int) -> Collected:
    """The features of all parts: of many, added up by tasks of Ray, a chunk of parts each, unless `workers` is 0."""
    chunks = [list(parts[start : start + CHUNK]) for start in range(0, len(parts), CHUNK)]
    if len(chunks) < 2 or workers == 0:
        return collect(address, parts, keep)
    items = [{"number": number, "parts": chunk} for number, chunk in enumerate(chunks)]
    added = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _add_up, batch_size=1, compute=TaskPoolStrategy(), fn_kwargs={"address": address, "keep": keep}
    )
    found = sorted((int(row["number"]), row["collected"]) for row in added.iter_rows())
    return total((Collected.unpacked(data) for _, data in found), keep)


def _add_up(batch: dict[str, Any], address: str, keep: int) -> dict[str, Any]:
    parts = [str(part) for part in batch["parts"][0]]
    return {"number": batch["number"], "collected": [collect(address, parts, keep).packed()]}
