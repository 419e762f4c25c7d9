"""The deployed sampler: a request is one picture, or a batch job's many; all that is drawn at a time shares batches."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymuse.config.drawing import DrawPrecision
from raymuse.config.errors import UserError
from raymuse.config.generate import CheckingConfig
from raymuse.drawing.drawer import Drawer
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.scheduler import Picture, Ticket
from raymuse.drawing.tasks import Ids, Request
from raymuse.models.lora import adapter_sha256
from raymuse.pipeline import Pipeline
from raymuse.serving.asked import Drawing, DrawRequest
from raymuse.serving.checker import checker_facts, open_checker
from raymuse.serving.limit import Limit, measure


class GeneratorActor:
    """Holds the model. Whatever is asked for shares its batches, by the step: see `drawing/scheduler.py`.

    Args:
        model: model folder.
        lora: adapters merged into it, by address and scale.
        batch_size: rows of a batch.
        drawers: threads that draw, each a batch of its own; the event loop stays free to answer.
        device: "cpu" or "cuda".
        styles: LoRAs by name, of which requests may name one.
        most_styles: how many of them, with their scales, are held at a time.
        checking: who looks at what is drawn.
        precision: of the transformers.
        cuda_graphs: whether sampling steps are CUDA graphs.
        traced: whether the transformers' operations are recorded, and repeated without Python between them.
    """

    def __init__(
        self,
        model: str,
        lora: dict[str, float],
        batch_size: int,
        drawers: int,
        device: str,
        styles: dict[str, str],
        most_styles: int,
        checking: CheckingConfig,
        precision: DrawPrecision,
        cuda_graphs: bool,
        traced: bool,
    ) -> None:
        self.pipeline = Pipeline.load(
            model, device=device, batch_size=batch_size, lora=lora, precision=precision, cuda_graphs=cuda_graphs
        )
        self._check = open_checker(checking, device)
        self._identity = identity(model, lora, batch_size, precision, checking, styles)
        self.styles, self.most_styles = styles, most_styles
        self._traced = traced
        self._plain = Studio(self._drawing(self.pipeline), drawers)
        self._styled: OrderedDict[tuple[str, float], Studio] = OrderedDict()
        self._styling = asyncio.Lock()

    async def draw(self, request: DrawRequest) -> Drawing:
        """Draw one picture for someone who waits: it is begun before those that are not urgent."""
        async with self._studio(request) as studio:
            asked = await asyncio.to_thread(request.of, studio.pipeline)
            return (await self._checked(await studio.draw([Ticket(asked, urgent=True)])))[0]

    async def draw_batch(self, requests: list[DrawRequest]) -> list[Drawing | Exception]:
        """Draw the pictures of a batch job; `batch_size` of one style cost what one does.

        What the model cannot draw comes back as its UserError, in its place.
        """
        places: dict[tuple[str | None, float], list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault((request.style, request.style_scale), []).append(place)
        drawn = await asyncio.gather(*(self._alike([requests[place] for place in some]) for some in places.values()))
        answers = {
            place: answer
            for some, these in zip(places.values(), drawn, strict=True)
            for place, answer in zip(some, these, strict=True)
        }
        return [answers[place] for place in range(len(requests))]

    async def _alike(self, requests: list[DrawRequest]) -> list[Drawing | Exception]:
        """Pictures of one style."""
        async with self._studio(requests[0]) as studio:
            asked = await asyncio.to_thread(_asked, studio.pipeline, requests)
            tickets = [Ticket(one) for one in asked if not isinstance(one, UserError)]
            drawn = iter(await self._checked(await studio.draw(tickets)))
        return [one if isinstance(one, UserError) else next(drawn) for one in asked]

    async def draw_stream(self, request: DrawRequest, partials: int) -> AsyncIterator[NDArray[np.uint8] | Drawing]:
        """The picture after so many of its steps, evenly spread, grey where nothing is known; then the whole one.

        With a checker there is the whole one alone: half a picture cannot be judged.
        """
        partials = 0 if self._check is not None else partials
        async with self._studio(request) as studio:
            asked = await asyncio.to_thread(request.of, studio.pipeline)
            loop, shown = asyncio.get_running_loop(), asyncio.Queue[Ids | None]()
            steps, gone = len(asked.base.course.remaining), 0
            wanted = {round((number + 1) * steps / (partials + 1)) for number in range(partials)} - {steps}

            def on_step(ids: Ids) -> None:
                nonlocal gone
                gone += 1
                if gone in wanted:
                    loop.call_soon_threadsafe(shown.put_nowait, ids)

            drawing = asyncio.ensure_future(studio.draw([Ticket(asked, urgent=True, on_step=on_step)]))
            drawing.add_done_callback(lambda _: shown.put_nowait(None))
            try:
                while (ids := await shown.get()) is not None:
                    yield await asyncio.to_thread(studio.pipeline.preview, ids)
                yield (await self._checked(await drawing))[0]
            finally:
                drawing.cancel()

    async def describe(self) -> dict[str, int]:
        """Sides of the pictures, pixels, and how many pictures are asked for and not done."""
        settings, load = self.pipeline.settings, sum(studio.load for studio in (self._plain, *self._styled.values()))
        return {"size": settings.size, "base_size": settings.base_size, "load": load}

    async def identity(self) -> dict[str, Any]:
        """What decides the pictures: two generators of whom this is the same draw the same."""
        return await asyncio.to_thread(lambda: dict(self._identity))

    async def limit(self, peak: float | None) -> Limit:
        """What a picture costs, and what this replica's hardware can do: `peak`, or as measured."""
        return await asyncio.to_thread(measure, self.pipeline, len(self._plain.drawers), peak)

    async def _checked(self, drawn: list[Drawing]) -> list[Drawing]:
        """The same, those that the checker refuses with its reason."""
        if (check := self._check) is None:
            return drawn
        return await asyncio.to_thread(lambda: [replace(one, refused=check(one.pixels)) for one in drawn])

    def _drawing(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline that draws, of one with plain weights."""
        return pipeline.traced() if self._traced else pipeline

    @asynccontextmanager
    async def _studio(self, request: DrawRequest) -> AsyncIterator["Studio"]:
        """The model in the request's style, which is made where it is asked for, in place of one that nobody uses."""
        if request.style is None:
            yield self._plain
            return
        key = (request.style, request.style_scale)
        async with self._styling:
            while key not in self._styled and len(self._styled) >= self.most_styles:
                idle = next((old for old, studio in self._styled.items() if studio.users == 0), None)
                if idle is None:
                    await asyncio.sleep(0.05)
                else:
                    self._styled.pop(idle).close()
            if key not in self._styled:
                adapters = {self.styles[request.style]: request.style_scale}
                styled = await asyncio.to_thread(self.pipeline.styled, adapters)
                self._styled[key] = Studio(self._drawing(styled), len(self._plain.drawers))
            self._styled.move_to_end(key)
            studio = self._styled[key]
            studio.users += 1
        try:
            yield studio
        finally:
            studio.users -= 1


class Studio:
    """One set of weights, and the threads that draw with it.

    Attributes:
        users: requests that need it to stay.
    """

    def __init__(self, pipeline: Pipeline, drawers: int) -> None:
        self.pipeline = pipeline
        self.drawers = [Drawer(pipeline) for _ in range(drawers)]
        self.users = 0

    @property
    def load(self) -> int:
        """Pictures that are asked for and not done."""
        return sum(drawer.load for drawer in self.drawers)

    def close(self) -> None:
        for drawer in self.drawers:
            drawer.close()

    async def draw(self, tickets: list[Ticket]) -> list[Drawing]:
        """Whoever stops waiting for the pictures stops their drawing."""
        drawer = min(self.drawers, key=lambda drawer: drawer.load)
        try:
            drawn: list[Picture] = await asyncio.gather(
                *(asyncio.wrap_future(drawer.draw(ticket)) for ticket in tickets)
            )
        finally:
            for ticket in tickets:
                ticket.cancelled = True  # those that are done do not mind
        return [Drawing(picture.pixels, picture.base_pixels) for picture in drawn]


def identity(
    model: str,
    lora: dict[str, float],
    batch_size: int,
    precision: DrawPrecision,
    checking: CheckingConfig,
    styles: dict[str, str],
) -> dict[str, Any]:
    """What decides a generator's pictures."""
    facts = {"model": model_sha256(model, lora), "batch_size": batch_size, "precision": precision}
    return {**facts, **checker_facts(checking), "styles": _readable(styles)}


def _readable(styles: dict[str, str]) -> dict[str, str]:
    """The styles' sha256; one that is gone is missed by the request that asks for it."""
    known = {}
    for name, address in styles.items():
        with suppress(UserError):
            known[name] = adapter_sha256(address)
    return known


def draws_as(generator: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a generator draws all that is wanted, by the identities of both; it may have more styles."""
    has_styles = wanted["styles"].items() <= generator["styles"].items()
    return has_styles and {**generator, "styles": None} == {**wanted, "styles": None}


def _asked(pipeline: Pipeline, requests: list[DrawRequest]) -> list[Request | UserError]:
    """Each request as the pipeline draws it, or why it cannot."""
    asked: list[Request | UserError] = []
    for request in requests:
        try:
            asked.append(request.of(pipeline))
        except UserError as error:
            asked.append(error)
    return asked
