"""The deployed sampler: a request is one picture, and those that meet share a batch; or it is a batch already."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from raymuse.config.generate import GenerateConfig, ServeConfig
from raymuse.config.sampling import Options
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
    """Holds the model; draws requests in padded batches of one size, so that no picture depends on its batch.

    Args:
        model: model folder.
        lora: adapters merged into it, by address and scale.
        batch_size: rows of a batch.
        batches: how many are drawn at a time, each on one thread: so sums do not depend on the number of cores, and
            the event loop stays free to answer.
        device: "cpu" or "cuda".
    """

    def __init__(self, model: str, lora: dict[str, float], batch_size: int, batches: int, device: str) -> None:
        self.pipeline = Pipeline.load(model, device=device, batch_size=batch_size, lora=lora)
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
    """Draw requests together, whatever their steps and guidance; the answers keep their order."""
    drawn = pipeline.draw([pipeline.request(one.prompt, one.seed, one.negative, **one.options) for one in requests])
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
