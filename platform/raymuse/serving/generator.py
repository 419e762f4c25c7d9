"""The deployed sampler: a request is one picture, and those that meet share a batch; or it is a batch already."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

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
    def sampling(self) -> tuple[int, float, float]:
        """What requests of one batch must share; -1 stands for the default."""
        return (self.steps or -1, _or(self.guidance), _or(self.temperature))


@dataclass(frozen=True)
class Drawing:
    """One drawn picture, uint8 (H, W, 3), and the base's own."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]


@serve.deployment(logging_config=QUIET)
class Generator:
    """Holds the model; draws requests in padded batches of one size, so that no picture depends on its batch.

    Args:
        model: model folder.
        batch_size: rows of a batch.
        batches: how many are drawn at a time, each on one thread: so sums do not depend on the number of cores, and
            the event loop stays free to answer.
        device: "cpu" or "cuda".
    """

    def __init__(self, model: str, batch_size: int, batches: int, device: str) -> None:
        self.pipeline = Pipeline.load(model, device=device, batch_size=batch_size)
        self.threads = ThreadPoolExecutor(batches, initializer=torch.set_num_threads, initargs=(1,))
        batched = serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=0.02, max_concurrent_batches=batches)
        self.draw_with_others = batched(self.draw_batch)  # made here: a decorator would not know the sizes

    async def draw(self, request: DrawRequest) -> Drawing:
        """Draw one picture, together with those asked for at the same time."""
        drawing: Drawing = await self.draw_with_others(request)
        return drawing

    async def draw_batch(self, requests: list[DrawRequest]) -> list[Drawing]:
        """Draw pictures together; `batch_size` of them cost what one does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, draw_all, self.pipeline, requests)

    async def describe(self) -> dict[str, int]:
        """Size of the pictures, pixels."""
        return {"size": self.pipeline.settings.size, "base_size": self.pipeline.settings.base_size}


def draw_all(pipeline: Pipeline, requests: list[DrawRequest]) -> list[Drawing]:
    """Draw requests, those with equal sampling parameters together; the answers keep the requests' order."""
    drawings: dict[int, Drawing] = {}
    order = sorted(range(len(requests)), key=lambda place: requests[place].sampling)
    for _, group in groupby(order, key=lambda place: requests[place].sampling):
        places = list(group)
        first = requests[places[0]]
        drawn = pipeline(
            [requests[place].prompt for place in places],
            negative=[requests[place].negative for place in places],
            seeds=[requests[place].seed for place in places],
            steps=first.steps,
            guidance=first.guidance,
            temperature=first.temperature,
        )
        for place, pixels, base in zip(places, drawn.pixels, drawn.base_pixels, strict=True):
            drawings[place] = Drawing(pixels, base)
    return [drawings[place] for place in range(len(requests))]


def deployed(
    model: str, *, batch_size: int, replicas: int, cpus: float, gpus: float, max_queue: int | None = None
) -> serve.Application:
    """The generator as a Serve application, sized so that its batches fill."""
    batches = batches_at_a_time(cpus, gpus)
    options = Generator.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        # Requests wait at the replica, where they meet to a batch: Serve's router lets them in a few a second.
        max_ongoing_requests=2 * batch_size * batches + (max_queue or 0),
        max_queued_requests=-1 if max_queue is None else max_queue,
        health_check_period_s=2,  # a lost replica is noticed in seconds, not half a minute
        graceful_shutdown_wait_loop_s=0.1,  # who stops it has all answers
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return options.bind(model, batch_size, batches, "cuda" if gpus else "cpu")


def batches_at_a_time(cpus: float, gpus: float) -> int:
    """Batches that a replica draws at a time: one a core, or one on its GPU."""
    return 1 if gpus else max(1, int(cpus))


def _or(value: float | None) -> float:
    return -1.0 if value is None else value
