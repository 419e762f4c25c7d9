"""Prompts to pictures through the deployed generator, exactly once.

    plan: parts of consecutive pictures -> Serve draws them -> a CPU task writes PNG, tar and rows -> the manifest

A picture's seed follows from the run's seed and its place, so a resume draws what an undisturbed run would have.
"""

import hashlib
import io
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import ray
from PIL import Image

from raymuse.config.edit import STRENGTH
from raymuse.config.errors import TooManyRejects, UserError
from raymuse.config.generate import GenerateConfig
from raymuse.config.sampling import Options, SamplingConfig
from raymuse.drawing.inputs import read_mask
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.seeds import sample_seed
from raymuse.encoding.pictures import decode
from raymuse.masking import fresh_steps, guidance_scales
from raymuse.models.lora import adapter_sha256
from raymuse.pipeline import Pipeline
from raymuse.serving.asked import Drawing, DrawRequest, Editing
from raymuse.serving.checker import checker_facts, open_checker
from raymuse.serving.engines import Engine, ask, engine
from raymuse.serving.limit import Limit
from raymuse.serving.parts import write_part
from raymuse.serving.progress import Done, Progress
from raymuse.serving.replicas import batches_at_a_time
from raymuse.storage.batch_check import PLAN
from raymuse.storage.contact_sheet import Entry, sheet_html, sheet_png
from raymuse.storage.generated import ROWS_SCHEMA, Generated, PictureRow, read_part
from raymuse.storage.manifest import Manifest, PartRecord
from raymuse.storage.prompts import Asked, DenyList, Prompt, read_beside, read_prompts
from raymuse.storage.rejects import Reason, Reject, Unreadable
from raymuse.tracking.run import Run

SHEET_PICTURES = 36
MEASURED_FROM = 200  # pictures of a job that is held against its hardware's limit


@dataclass(frozen=True)
class Wanted:
    """One picture of the plan: its prompt, which sample of it, and its seed."""

    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.prompt.index:09d}-{self.sample}"


@dataclass(frozen=True)
class _Begun:
    """A part that is on its way.

    Attributes:
        wanted: its pictures.
        batches: the answers for them.
    """

    part: str
    wanted: list[Wanted]
    batches: list[Future[list[Drawing | Exception]]]


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
        sampling = _changed(pipeline.settings.base, config.sampling)
        if config.checker is None:
            print("pictures are not looked at before they are written: checker=... has them checked", flush=True)
        rest: dict[str, Any] = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "temperature": sampling.temperature,
        }
        rest |= {"model": facts["model_sha256"][:16], "batch_size": config.batch_size, "precision": config.precision}
        rest |= {"superres_sampling": _text(config.superres_sampling)}
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
        for record, passes in _Job(drawing, config, facts, sampling).records(missing):
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


class _Job:
    """Parts to their records: asked for in batches, a few parts at a time, and written by tasks.

    Args:
        facts: what all rows have in common.
        sampling: the model's own.
    """

    def __init__(
        self, drawing: Engine, config: GenerateConfig, facts: dict[str, Any], sampling: SamplingConfig
    ) -> None:
        self.drawing, self.config, self.facts, self.sampling = drawing, config, facts, sampling
        self.denied = DenyList.read(config.deny)
        self.styled: dict[tuple[str, float], str] = {}
        # Two with the replicas for each that they draw at a time: the next is at hand, and Serve's router never has to
        # make one wait. Where it has to, it tries again after half a second, and replicas draw a few pictures a batch.
        batches = batches_at_a_time(config.cpus_per_replica, config.gpus_per_replica)
        self.pool = ThreadPoolExecutor(2 * config.replicas * batches)

    def records(self, missing: Iterable[tuple[str, list[Wanted]]]) -> Iterator[tuple[PartRecord, int]]:
        """In the order of the parts; while one is written the next are drawn, `in_flight` in all.

        With each how often its pictures asked the base's network.
        """
        begun: deque[_Begun] = deque()
        try:
            for part, wanted in missing:
                begun.append(self._begin(part, wanted))
                if len(begun) == self.config.in_flight:
                    yield self._finish(begun.popleft())
            while begun:
                yield self._finish(begun.popleft())
        finally:
            self.pool.shutdown(cancel_futures=True)

    def _begin(self, part: str, wanted: list[Wanted]) -> _Begun:
        """Have a part's pictures drawn, in batches."""
        size = self.config.batch_size
        batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        return _Begun(part, wanted, [self.pool.submit(self._drawn, batch) for batch in batches])

    def _drawn(self, batch: list[Wanted]) -> list[Drawing | Exception]:
        """A batch's pictures, or why there is none. Files that rows name are read here, a batch at a time."""
        requests: list[DrawRequest | Exception] = []
        for one in batch:
            try:
                requests.append(self._request(one))
            except (Unreadable, UserError) as fault:
                requests.append(fault)
        good = [request for request in requests if isinstance(request, DrawRequest)]
        answers = iter(ask(self.drawing, good) if good else [])
        return [request if isinstance(request, Exception) else next(answers) for request in requests]

    def _request(self, one: Wanted) -> DrawRequest:
        """What the generator is asked for.

        Raises:
            Unreadable, UserError: for a row that cannot be drawn.
        """
        if one.prompt.fault is not None:
            raise Unreadable(*one.prompt.fault)
        if (phrase := self.denied.found(one.prompt.prompt)) is not None:
            raise Unreadable(Reason.DENIED, f"{phrase!r} stands in {self.config.deny}")
        asked, editing = one.prompt.asked, None
        if asked.image is not None and asked.what is not None:
            strength = STRENGTH if asked.strength is None else asked.strength
            area = None if asked.mask is None else read_mask(self._picture(asked.mask))
            editing = Editing(asked.what, np.asarray(self._picture(asked.image)), area, strength, asked.grown)
        if asked.lora is not None and asked.lora not in self.config.styles:
            known = ", ".join(self.config.styles) or "none"
            raise UserError(f"lora: {asked.lora!r} is none of the job's styles, which are: {known}")
        return DrawRequest(
            one.prompt.prompt,
            one.seed,
            **self._options(one.prompt),
            sampling=self._sampling_of(one.prompt),
            superres=cast(Options, self.config.superres_sampling),
            size=asked.pixels or self.config.size,
            editing=editing,
            style=asked.lora,
            style_scale=asked.lora_scale,
        )

    def _picture(self, name: str) -> Image.Image:
        """A picture that a row names."""
        return decode(read_beside(self.config.prompts, name, self.config.pictures_anywhere))

    def _options(self, prompt: Prompt) -> dict[str, Any]:
        """What a row's pictures are drawn with: its own word, else the config's."""
        asked, names = prompt.asked, ("negative", "steps", "guidance", "temperature")
        return {name: getattr(self.config, name) if (own := getattr(asked, name)) is None else own for name in names}

    def _sampling_of(self, prompt: Prompt) -> Options:
        """What else is not as the model has it: the row's own word, else the config's."""
        return cast(Options, {**self.config.sampling, **prompt.asked.sampling})

    def _passes(self, prompt: Prompt) -> int:
        """How often a picture asks the base's network: once a step, twice where what guidance adds is computed."""
        said = {name: value for name, value in self._options(prompt).items() if value is not None}
        own = _changed(self.sampling, {**prompt.asked.sampling, **said})
        scales = guidance_scales(own.guidance, own.steps, own.guidance_schedule, own.guidance_span)
        return own.steps + sum(fresh_steps(scales, own.guidance_every))

    def _finish(self, begun: _Begun) -> tuple[PartRecord, int]:
        """Wait for a part's pictures and have them written."""
        answers = [_judged(answer) for batch in begun.batches for answer in batch.result()]
        rows, drawings, rejects, passes = [], [], [], 0
        for one, answer in zip(begun.wanted, answers, strict=True):
            if isinstance(answer, Exception):
                rejects.append(Reject(self.config.prompts, one.key, *_fault(answer)))
                continue
            passes += self._passes(one.prompt)
            rows.append(self._row(one, answer, begun.part))
            drawings.append(answer)
        address, keep_base = self.config.output, self.config.keep_base
        record: PartRecord = ray.get(write_part.remote(address, begun.part, rows, drawings, rejects, keep_base))
        return record, passes

    def _row(self, one: Wanted, drawing: Drawing, part: str) -> PictureRow:
        height, width = drawing.pixels.shape[:2]
        options = {name: value for name, value in self._options(one.prompt).items() if value is not None}
        return PictureRow(
            index=one.prompt.index,
            sample=one.sample,
            key=one.key,
            source_key=one.prompt.key,
            prompt=one.prompt.prompt,
            seed=one.seed,
            width=width,
            height=height,
            part=part,
            task=one.prompt.asked.what or "",
            sampling=_text(self._sampling_of(one.prompt)),
            **{**self.facts, **options, "model": self._model(one.prompt.asked)},
        )

    def _model(self, asked: Asked) -> str:
        """What tells the weights apart that a row was drawn with."""
        if asked.lora is None:
            return str(self.facts["model"])
        key = (asked.lora, asked.lora_scale)
        if key not in self.styled:
            merged = {**self.config.adapters, self.config.styles[asked.lora]: asked.lora_scale}
            self.styled[key] = model_sha256(self.config.model, merged)[:16]
        return self.styled[key]


def _changed(sampling: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    """The same with changes of any of its fields, as far as it knows them; wrong ones are said by the pipeline."""
    return sampling.model_copy(update={name: value for name, value in changes.items() if value is not None})


def _text(changes: Mapping[str, Any]) -> str:
    """Changes to a sampling as a row says them: JSON, or nothing."""
    return json.dumps(dict(changes), sort_keys=True) if changes else ""


def _judged(answer: Drawing | Exception) -> Drawing | Exception:
    """The drawing, or why nobody may have it."""
    if isinstance(answer, Drawing) and answer.refused is not None:
        return Unreadable(Reason.REFUSED_PICTURE, answer.refused)
    return answer


def _fault(error: Exception) -> tuple[Reason, str]:
    """What the rejects say of a picture that there is none of."""
    if isinstance(error, Unreadable):
        return error.reason, error.detail
    reason = Reason.BAD_PARAMETER if isinstance(error, UserError) else Reason.GENERATION_FAILED
    return reason, str(getattr(error, "cause", error))[:500]


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
