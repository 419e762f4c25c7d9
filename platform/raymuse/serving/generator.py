"""The deployed sampler: one request is one picture, and requests that meet share a batch."""

import asyncio
from dataclasses import dataclass
from itertools import groupby

import numpy as np
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
        device: "cpu" or "cuda".
    """

    def __init__(self, model: str, batch_size: int, device: str = "cpu") -> None:
        self.pipeline = Pipeline.load(model, device=device, batch_size=batch_size)
        self.draw.set_max_batch_size(batch_size)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def draw(self, requests: list[DrawRequest]) -> list[Drawing]:
        """Draw concurrent requests together."""
        return await asyncio.to_thread(draw_all, self.pipeline, requests)

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
    model: str, *, batch_size: int, replicas: int, cpus: float, gpus: float, max_queue: int = -1
) -> serve.Application:
    """The generator as a Serve application, sized so that its batches fill."""
    options = Generator.options(  # type: ignore[attr-defined]
        num_replicas=replicas,
        max_ongoing_requests=2 * batch_size,
        max_queued_requests=max_queue,
        health_check_period_s=2,  # a lost replica is noticed in seconds, not half a minute
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return options.bind(model, batch_size, "cuda" if gpus else "cpu")


def _or(value: float | None) -> float:
    return -1.0 if value is None else value
