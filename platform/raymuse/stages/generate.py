"""Prompts to pictures through the deployed generator, exactly once.

    plan: parts of consecutive pictures -> Serve draws them -> a CPU task writes PNG, tar and rows -> the manifest

A picture's seed follows from the run's seed and its place, so a resume draws what an undisturbed run would have.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from raymuse.config.errors import TooManyRejects
from raymuse.config.generate import GenerateConfig
from raymuse.config.sampling import Options, SamplingConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.seeds import sample_seed
from raymuse.models.lora import adapter_sha256
from raymuse.pipeline import Pipeline
from raymuse.serving.checker import checker_facts, open_checker
from raymuse.serving.engines import Engine, engine
from raymuse.serving.job import Job, Wanted, as_text, changed
from raymuse.serving.limit import Limit
from raymuse.serving.progress import Done, Progress
from raymuse.storage.batch_check import PLAN
from raymuse.storage.contact_sheet import Entry, sheet_html, sheet_png
from raymuse.storage.generated import ROWS_SCHEMA, Generated, read_part
from raymuse.storage.manifest import Manifest
from raymuse.storage.prompts import DenyList, Prompt, read_prompts
from raymuse.tracking.run import Run

SHEET_PICTURES = 36
MEASURED_FROM = 200  # pictures of a job that is held against its hardware's limit


def generate(config: GenerateConfig, run: Run) -> str:
    """Draw all prompts and return the folder of the pictures. Needs Ray.

    Raises:
        UserError: for prompts or a model that cannot be read, and an output that is another's.
        TooManyRejects: after the end, where more pictures failed than the config allows.
    """
    asked = survey(config)
    facts: dict[str, Any] = {"model_sha256": model_sha256(config.model, config.adapters), "prompts": asked.sha256}
    if config.deny is not None:
        facts["denied"] = hashlib.sha256(repr(DenyList.read(config.deny)).encode()).hexdigest()
    if config.styles:
        facts["styles"] = {name: adapter_sha256(address) for name, address in config.styles.items()}
    open_checker(config)  # what is wrong with it shows here, before anything is drawn
    facts |= checker_facts(config)
    manifest = Manifest.open(config.output, {**config.identity(), **facts})
    if not manifest.finished:
        manifest.folder.write(PLAN, json.dumps({"pictures": asked.pictures}).encode())
        run.params({**config.model_dump(mode="json"), **facts})
        every = {**config.adapters, **dict.fromkeys(config.styles.values(), 1.0)}  # what does not fit shows here
        pipeline = Pipeline.load(config.model, lora=every)
        pipeline.request("", 0, superres=cast(Options, config.superres_sampling), **config.sampling)  # what is wrong
        sampling = changed(pipeline.settings.base, config.sampling)
        if config.checker is None:
            print("pictures are not looked at before they are written: checker=... has them checked", flush=True)
        rest: dict[str, Any] = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "temperature": sampling.temperature,
        }
        rest |= {"model": facts["model_sha256"][:16], "batch_size": config.batch_size, "precision": config.precision}
        rest |= {"superres_sampling": as_text(config.superres_sampling)}
        _draw_pending(manifest, asked.pictures, config, rest, sampling, run)
        _write_table(manifest)
        _write_sheets(manifest, run)
        manifest.finish(**facts)
    manifest.release()
    rejects = sum(part.rejects for part in manifest.done.values())
    if rejects > config.max_reject_fraction * asked.pictures:
        raise TooManyRejects(rejects, asked.pictures, f"{config.output}/rejects")
    return config.output


@dataclass(frozen=True)
class Survey:
    """What a file of prompts asks for.

    Attributes:
        pictures: how many, of all prompts; of a shard its own.
        sha256: of the prompts.
    """

    pictures: int
    sha256: str


def survey(config: GenerateConfig) -> Survey:
    """Read the prompts through once, holding one of them at a time."""
    total, digest = 0, hashlib.sha256()
    for prompt in read_prompts(config.prompts):
        digest.update(("\n" if total else "").encode() + repr(prompt).encode())
        total += prompt.asked.samples or config.samples
    (shard, shards), size = config.split, config.pictures_per_part
    pictures = sum(min(size, total - first) for first in range(shard * size, total, shards * size))
    return Survey(pictures, digest.hexdigest())


def plan_parts(prompts: Iterable[Prompt], config: GenerateConfig) -> Iterator[tuple[str, list[Wanted]]]:
    """Which picture is in which part, of this shard: a function of prompts and config alone."""
    wanted = (
        Wanted(prompt, sample, sample_seed(config.seed, prompt.index, sample, prompt.asked.seed))
        for prompt in prompts
        for sample in range(prompt.asked.samples or config.samples)
    )
    shard, shards = config.split
    for number in itertools.count():
        if not (part := list(itertools.islice(wanted, config.pictures_per_part))):
            return
        if number % shards == shard:
            yield f"part-{number:06d}", part


def _draw_pending(
    manifest: Manifest, pictures: int, config: GenerateConfig, facts: dict[str, Any], sampling: SamplingConfig, run: Run
) -> None:
    """Draw the missing parts, a few on their way at a time, recording each as it is written."""
    left = pictures - sum(part.rows + part.rejects for part in manifest.done.values())
    if left == 0:
        return
    plan = plan_parts(read_prompts(config.prompts), config)
    missing = ((part, wanted) for part, wanted in plan if part not in manifest.done)
    name = f"raymuse-generate-{hashlib.sha256(manifest.folder.address.encode()).hexdigest()[:8]}"
    with engine(config, name) as drawing:
        limit = _limit(drawing, config, left, run)
        progress = Progress(left, config.replicas, limit, run, config.price_per_hour)
        for record, passes in Job(drawing, config, facts, sampling).records(missing):
            manifest.record(record)
            progress.add(Done(record.rows, record.rejects, passes), len(manifest.done))


def _limit(drawing: Engine, config: GenerateConfig, left: int, run: Run) -> Limit | None:
    """What the hardware could do; None for a job that ends sooner than it is measured, and where nobody could say."""
    if left < MEASURED_FROM:
        return None
    limit = drawing.limit(None if config.peak_tflops is None else config.peak_tflops * 1e12)
    if limit is None:
        print("the replicas died while they were measured: the hardware's share is not told", flush=True)
        return None
    how = f"measured with a product of {config.precision} matrices" if config.peak_tflops is None else "as given"
    print(
        f"a replica can do {limit.peak / 1e12:.3g} TFLOP/s ({how}), a picture takes {limit.first / 1e9:.3g} GFLOP and "
        f"{limit.further / 1e9:.3g} more a pass of the base",
        flush=True,
    )
    run.params({"limit.peak_flops": limit.peak, "limit.first_flops": limit.first, "limit.pass_flops": limit.further})
    return limit


def _write_table(manifest: Manifest) -> None:
    """manifest.parquet: every picture's row, in the order of the prompts; a part's rows at a time."""

    def fill(path: Path) -> None:
        with pq.ParquetWriter(path, ROWS_SCHEMA, compression="zstd") as writer:
            for part in sorted(manifest.done):
                writer.write_table(pq.read_table(io.BytesIO(manifest.folder.read(f"rows/{part}.parquet"))))

    manifest.folder.write_with("manifest.parquet", fill)


def _write_sheets(manifest: Manifest, run: Run) -> None:
    """contact_sheet.png and .html of the first pictures: prompt, base, and the super-resolved picture."""
    first: list[Generated] = []
    for part in sorted(manifest.done):
        first += list(read_part(manifest.folder, part))
        if len(first) >= 10 * SHEET_PICTURES:
            break
    if not first:
        return
    cascade = first[0].base_pixels is not None
    labels = ("base", "super-resolution") if cascade else ("picture",)
    entries = [
        Entry(one.row.prompt, (one.pixels,) if one.base_pixels is None else (one.base_pixels, one.pixels))
        for one in first
    ]
    title = f"{len(entries)} of {sum(part.rows for part in manifest.done.values())} pictures"
    sheet = sheet_png(entries[:SHEET_PICTURES], labels, title)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    manifest.folder.write("contact_sheet.png", buffer.getvalue())
    manifest.folder.write("contact_sheet.html", sheet_html(entries, labels, title).encode())
    run.picture("contact_sheet", sheet, 0)
