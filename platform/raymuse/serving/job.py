"""A batch job: its pictures asked for in batches, a few parts at a time, and a record of each part as it is written."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from PIL import Image

from raymuse.config.edit import STRENGTH
from raymuse.config.errors import UserError
from raymuse.config.generate import GenerateConfig
from raymuse.config.sampling import Options, SamplingConfig
from raymuse.drawing.inputs import read_mask
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.seeds import picture_key
from raymuse.encoding.pictures import decode
from raymuse.masking import fresh_steps, guidance_scales
from raymuse.serving.asked import Drawing, DrawRequest, Editing
from raymuse.serving.engines import Engine, ask
from raymuse.serving.parts import write_part
from raymuse.serving.replicas import batches_at_a_time
from raymuse.storage.generated import PictureRow
from raymuse.storage.manifest import PartRecord
from raymuse.storage.prompts import Asked, DenyList, Prompt, read_beside
from raymuse.storage.rejects import Reason, Reject, Unreadable


@dataclass(frozen=True)
class Wanted:
    """One picture of the plan: its prompt, which sample of it, and its seed."""

    prompt: Prompt
    sample: int
    seed: int

    @property
    def key(self) -> str:
        return picture_key(self.prompt.index, self.sample)


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


class Job:
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
        own = changed(self.sampling, {**prompt.asked.sampling, **said})
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
            sampling=as_text(self._sampling_of(one.prompt)),
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


def changed(sampling: SamplingConfig, changes: Mapping[str, Any]) -> SamplingConfig:
    """The same with changes of any of its fields, as far as it knows them; wrong ones are said by the pipeline."""
    return sampling.model_copy(update={name: value for name, value in changes.items() if value is not None})


def as_text(changes: Mapping[str, Any]) -> str:
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
