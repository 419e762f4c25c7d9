"""Pictures drawn to be measured at once: the same prompts and seeds in several ways, a chunk of prompts a part.

parts/p003-000000.parquet    rows of the way `p003`: also index, sample, seed, and `png` of those that a sheet shows
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter
from typing import Any

import numpy as np

from raymuse.config.errors import UserError
from raymuse.config.sampling import Options, SamplingConfig
from raymuse.config.score import DrawnConfig
from raymuse.drawing.model_folder import Settings, local_folder
from raymuse.drawing.seeds import picture_key, sample_seed
from raymuse.models.base import read_shape
from raymuse.models.network_files import read_config
from raymuse.models.vqmodel import VqModelConfig
from raymuse.pipeline import Pipeline, changed
from raymuse.scoring.collected import features_bytes, features_file
from raymuse.scoring.measures import Features, Measures, Pixels, Row, Subject, joined
from raymuse.scoring.parts import written
from raymuse.scoring.rows import rows_bytes, rows_file
from raymuse.storage.folder import Folder
from raymuse.storage.generated import read_part
from raymuse.storage.pictures import png_bytes
from raymuse.storage.prompts import Prompt, read_prompts


@dataclass(frozen=True)
class PlannedPicture:
    """One picture that every way draws."""

    index: int
    sample: int
    prompt: str
    negative: str
    seed: int
    size: tuple[int, int] | None

    @property
    def key(self) -> str:
        """As generate calls it."""
        return picture_key(self.index, self.sample)


@dataclass(frozen=True)
class Way:
    """How pictures come about: finished ones of a folder, or a model with LoRAs and sampling options.

    Attributes:
        kind: of its rows.
    """

    kind: str
    images: str | None
    model: str | None
    adapters: Mapping[str, float]
    options: Options


@dataclass(frozen=True)
class PlannedPart:
    """A part of a way: pictures to draw, or the name of a part of its folder."""

    way: str
    asked: tuple[PlannedPicture, ...] = ()
    source: str = ""


def sampling_of(model: str) -> tuple[SamplingConfig, int]:
    """How a model folder draws by default, and the side of its pictures in pixels, without its weights.

    Raises:
        UserError: it is no model folder.
    """
    folder = local_folder(model)
    factor = VqModelConfig.from_diffusers(read_config(folder / "vqvae", "vqvae", None)).factor
    settings = Settings.load(folder, read_shape(read_config(folder / "transformer", "transformer", None)), factor)
    return settings.base, settings.size


def resolved(model: str, own: SamplingConfig, options: Options) -> SamplingConfig:
    """What a model draws with: its own sampling with some options instead.

    Raises:
        UserError: for values that cannot be.
    """
    sampling = changed("sampling", own, options)
    if sampling.order == "critic" and not (local_folder(model) / "critic").exists():
        raise UserError(f"order critic: {model} has no critic/. `raymuse train critic` trains one.")
    return sampling


def asked_of(config: DrawnConfig, prompts: str) -> list[PlannedPicture]:
    """All pictures, in the order of the prompts, with the seeds that generate would give them.

    Raises:
        UserError: for prompts that cannot be read, or are no plain prompts.
    """
    found = []
    for prompt in read_prompts(prompts):
        _require_plain(prompts, prompt)
        negative = config.negative if prompt.asked.negative is None else prompt.asked.negative
        for sample in range(prompt.asked.samples or config.samples):
            seed = sample_seed(config.seed, prompt.index, sample, prompt.asked.seed)
            found.append(
                PlannedPicture(prompt.index, sample, prompt.prompt, negative, seed, prompt.asked.pixels or config.size)
            )
    return found


def _require_plain(address: str, prompt: Prompt) -> None:
    where = f"{address}, prompt {prompt.index}"
    if prompt.fault is not None:
        raise UserError(f"{where} cannot be drawn: {prompt.fault[1]}. Every prompt counts here: mend it.")
    if prompt.asked.image is not None:
        raise UserError(f"{where} starts from an image: sweeps and comparisons draw from prompts alone.")
    own = [name for name in ("steps", "guidance", "temperature", "lora") if getattr(prompt.asked, name) is not None]
    if own := [*own, *prompt.asked.sampling]:
        raise UserError(f"{where} has its own {', '.join(own)}, and here the command says how all are drawn: drop it.")


def asked_sha256(asked: Iterable[PlannedPicture]) -> str:
    """sha256 (hex) of what is drawn, in its order."""
    return hashlib.sha256("\n".join(repr(one) for one in asked).encode()).hexdigest()


def plan_drawn(way: str, asked: Sequence[PlannedPicture], size: int) -> dict[str, PlannedPart]:
    """The parts of a way that draws, by name."""
    chunks = [tuple(asked[start : start + size]) for start in range(0, len(asked), size)]
    return {f"{way}-{number:06d}": PlannedPart(way, chunk) for number, chunk in enumerate(chunks)}


class DrawnPart:
    """The actor: draws or reads a part's pictures, and measures them.

    Args:
        ways: by name.
        plan: by part.
        looks: model folder whose VQGAN looks at all pictures; None: none does.
        shown: keys of the pictures that are kept as PNG; None: all.
    """

    def __init__(
        self,
        config: DrawnConfig,
        ways: Mapping[str, Way],
        plan: Mapping[str, PlannedPart],
        looks: str | None,
        shown: frozenset[str] | None,
    ) -> None:
        self.config, self.ways, self.plan, self.shown = config, ways, plan, shown
        self.measures = Measures(config, looks)
        self.loaded: tuple[Any, Pipeline] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = str(batch["part"][0])
        planned = self.plan[part]
        way = self.ways[planned.way]
        if way.images is None:
            pictures, seconds = self._draw(way, planned.asked)
            facts = [_facts(one.key, one.prompt, one.index, one.sample, one.seed) for one in planned.asked]
        else:
            found, seconds = list(read_part(Folder(way.images), planned.source)), 0.0
            pictures = [one.pixels for one in found]
            facts = [_facts(x.row.key, x.row.prompt, x.row.index, x.row.sample, x.row.seed) for x in found]
        rows, features = self._measure(way.kind, pictures, facts)
        files = {rows_file(part): rows_bytes(rows), features_file(part): features_bytes({way.kind: features})}
        return written(self.config.output, part, files, len(rows), seconds=seconds)

    def _draw(self, way: Way, asked: Sequence[PlannedPicture]) -> tuple[list[Pixels], float]:
        """The pictures, and the seconds that drawing them took."""
        pipeline = self._pipeline(way)
        requests = [pipeline.request(one.prompt, one.seed, one.negative, one.size, **way.options) for one in asked]
        began = perf_counter()
        drawn = pipeline.draw(requests)
        return [picture.pixels for picture in drawn], perf_counter() - began

    def _pipeline(self, way: Way) -> Pipeline:
        """The way's model: kept until another way has another one."""
        wanted = (way.model, tuple(way.adapters.items()))
        if self.loaded is None or self.loaded[0] != wanted:
            assert way.model is not None, "a way without pictures has a model"
            self.loaded = None  # before the next takes memory
            device = "cuda" if self.config.gpus_per_worker > 0 else "cpu"
            pipeline = Pipeline.load(
                way.model, device=device, batch_size=self.config.draw_batch, lora=way.adapters or None
            )
            pipeline([""], seeds=[0], steps=1)  # what only the first picture takes time for is not measured
            self.loaded = wanted, pipeline
        return self.loaded[1]

    def _measure(self, kind: str, pictures: Sequence[Pixels], facts: Sequence[Row]) -> tuple[list[Row], Features]:
        rows: list[Row] = []
        seen: list[Features] = []
        for places in _batches(pictures, self.config.batch_size):
            pixels = np.stack([pictures[place] for place in places])
            some = [facts[place] for place in places]
            subject = Subject(kind, [x["key"] for x in some], [x["prompt"] for x in some], pixels.shape[1])
            said, found = self.measures.look(pixels, subject)
            shown = [self.shown is None or row["key"] in self.shown for row in said]
            pngs = [png_bytes(x, {}) if keep else None for x, keep in zip(pixels, shown, strict=True)]
            rows += [{**row, **more, "png": png} for row, more, png in zip(said, some, pngs, strict=True)]
            seen.append(found)
        return rows, joined(seen)


def _facts(key: str, prompt: str, index: int, sample: int, seed: int) -> Row:
    return {"key": key, "prompt": prompt, "index": index, "sample": sample, "seed": seed}


def _batches(pictures: Sequence[Pixels], most: int) -> Iterator[list[int]]:
    """Places of neighbours of one size, at most so many at a time."""
    for _, group in groupby(range(len(pictures)), key=lambda place: pictures[place].shape):
        places = list(group)
        yield from (places[start : start + most] for start in range(0, len(places), most))
