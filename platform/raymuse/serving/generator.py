"""The deployed sampler: a request is one picture, or a batch job's many; all that is drawn at a time shares batches."""

import asyncio
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from ray import serve

from raymuse.config.generate import GenerateConfig, ServeConfig
from raymuse.config.sampling import Options
from raymuse.drawing.drawer import Drawer
from raymuse.drawing.scheduler import Ticket
from raymuse.pipeline import Pipeline
from raymuse.serving.instance import QUIET


@dataclass(frozen=True)
class DrawRequest:
    """One picture to draw; None takes the model's own default."""

    prompt: str
    seed: int
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None

    @property
    def options(self) -> Options:
        given = {"steps": self.steps, "guidance": self.guidance, "temperature": self.temperature}
        return cast(Options, {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Drawing:
    """One drawn picture, uint8 (H, W, 3), and the base's own."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]


@serve.deployment(logging_config=QUIET)
class Generator:
    """Holds the model. Whatever is asked for shares its batches, by the step: see `drawing/scheduler.py`.

    Args:
        model: model folder.
        lora: adapters merged into it, by address and scale.
        batch_size: rows of a batch.
        drawers: threads that draw, each a batch of its own; the event loop stays free to answer.
        device: "cpu" or "cuda".
    """

    def __init__(self, model: str, lora: dict[str, float], batch_size: int, drawers: int, device: str) -> None:
        self.pipeline = Pipeline.load(model, device=device, batch_size=batch_size, lora=lora)
        self.drawers = [Drawer(self.pipeline) for _ in range(drawers)]

    async def draw(self, request: DrawRequest) -> Drawing:
        """Draw one picture for someone who waits: it is begun before those of batch jobs."""
        return (await self._draw([request], urgent=True))[0]

    async def draw_batch(self, requests: list[DrawRequest]) -> list[Drawing]:
        """Draw the pictures of a batch job; `batch_size` of them cost what one does."""
        return await self._draw(requests, urgent=False)

    async def describe(self) -> dict[str, int]:
        """Size of the pictures, pixels."""
        return {"size": self.pipeline.settings.size, "base_size": self.pipeline.settings.base_size}

    async def _draw(self, requests: list[DrawRequest], urgent: bool) -> list[Drawing]:
        """Draw requests, whatever their steps and guidance. Whoever stops waiting for them stops their drawing."""
        asked = [self.pipeline.request(one.prompt, one.seed, one.negative, **one.options) for one in requests]
        tickets = [Ticket(one, urgent) for one in asked]
        drawer = min(self.drawers, key=lambda drawer: drawer.load)
        try:
            drawn = await asyncio.gather(*(asyncio.wrap_future(drawer.draw(ticket)) for ticket in tickets))
        finally:
            for ticket in tickets:
                ticket.cancelled = True  # those that are done do not mind
        return [Drawing(picture.pixels, picture.base_pixels) for picture in drawn]


def deployed(config: GenerateConfig | ServeConfig, max_queue: int | None = None) -> serve.Application:
    """The generator as a Serve application, sized so that its batches fill."""
    cpus, gpus = config.cpus_per_replica, config.gpus_per_replica
    batches = batches_at_a_time(cpus, gpus)
    options = Generator.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        # Requests wait at the replica, where they meet to a batch: Serve's router lets them in a few a second.
        max_ongoing_requests=2 * config.batch_size * batches + (max_queue or 0),
        max_queued_requests=-1 if max_queue is None else max_queue,
        health_check_period_s=2,  # a lost replica is noticed in seconds, not half a minute
        graceful_shutdown_wait_loop_s=0.1,  # who stops it has all answers
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return options.bind(config.model, config.adapters, config.batch_size, batches, "cuda" if gpus else "cpu")


def batches_at_a_time(cpus: float, gpus: float) -> int:
    """Batches that a replica draws at a time: one a core, or one on its GPU."""
    return 1 if gpus else max(1, int(cpus))
