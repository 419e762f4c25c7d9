"""Who draws a batch job's pictures: replicas of the cluster's Serve, or actors of the job's own. The same pictures."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from raymuse.clusters.placement import place
from raymuse.config.errors import UserError
from raymuse.config.generate import GenerateConfig
from raymuse.serving.asked import LOST, Drawing, DrawRequest
from raymuse.serving.generator import GeneratorActor, draws_as, identity
from raymuse.serving.instance import ONLINE, join_serve, runs
from raymuse.serving.limit import Limit
from raymuse.serving.replicas import deployed, placed


@dataclass(frozen=True)
class Engine:
    """Who draws.

    Attributes:
        draw: some pictures together, and waits for them; many threads may ask at once. One that the model cannot draw
            comes back as the reason.
        limit: what a picture costs and a replica can do, given its operations a second, or None to measure them; None
            where the replicas die while they are asked: no job fails over a figure for its progress.
    """

    draw: Callable[[list[DrawRequest]], list[Drawing | Exception]]
    limit: Callable[[float | None], Limit | None]


TRIES = 5


@contextmanager
def engine(config: GenerateConfig, name: str) -> Iterator[Engine]:
    """The engine that a config names, for the length of a `with` block.

    Args:
        name: of the Serve application, which no other job may have.
    """
    engines = {"serve": serve_engine, "actors": actor_engine, "online": online_engine}
    with engines[config.engine](config, name) as drawing:
        yield drawing


@contextmanager
def serve_engine(config: GenerateConfig, name: str) -> Iterator[Engine]:
    """The generator as an application without a route: the job reaches it by its handle, and others keep theirs."""
    join_serve()
    handle = serve.run(deployed(config), name=name, route_prefix=None)
    try:
        yield _of(handle)
    finally:
        serve.delete(name)


@contextmanager
def online_engine(config: GenerateConfig, name: str) -> Iterator[Engine]:
    """The replicas that answer people: what these ask for is urgent, and takes the next free row.

    `name` is not needed: the application is there already, and stays.

    Raises:
        UserError: no model that is served on this cluster draws what the job is to draw.
    """
    wanted = identity(config.model, config.adapters, config.batch_size, config.precision, config, config.styles)
    running = serve.status().applications.get(ONLINE) if runs() else None
    for deployment in [one for one in running.deployments if one.startswith("Generator")] if running else []:
        handle = serve.get_deployment_handle(deployment, ONLINE)
        if draws_as(handle.identity.remote().result(), wanted):
            yield _of(handle)
            return
    raise UserError(
        f"engine=online draws with the replicas of `raymuse serve`, and none that runs on this cluster serves "
        f"{config.model} with batch_size={config.batch_size} and the same lora, styles, precision and checker."
    )


def _of(handle: DeploymentHandle) -> Engine:
    return Engine(
        lambda requests: list(handle.draw_batch.remote(requests).result()),
        lambda peak: _measured(lambda: cast(Limit, handle.limit.remote(peak).result())),
    )


@contextmanager
def actor_engine(config: GenerateConfig, name: str) -> Iterator[Engine]:
    """The generator in actors, each begun again where it dies, with what it was drawing.

    A batch goes to the actor that has least to do. `name` is not needed: they are this job's alone.
    """
    actor = ray.remote(GeneratorActor).options(
        num_cpus=config.cpus_per_replica,
        num_gpus=config.gpus_per_replica,
        label_selector=place("draw", config.gpus_per_replica),
        max_restarts=-1,
        max_task_retries=-1,
    )
    actors = [actor.remote(*placed(config, config)) for _ in range(config.replicas)]
    asked, lock = [0] * len(actors), threading.Lock()

    def draw(requests: list[DrawRequest]) -> list[Drawing | Exception]:
        with lock:
            number = min(range(len(actors)), key=asked.__getitem__)
            asked[number] += 1
        try:
            return list(ray.get(actors[number].draw_batch.remote(requests)))
        finally:
            with lock:
                asked[number] -= 1

    try:
        ray.get([one.describe.remote() for one in actors])  # one that cannot begin fails the job, not its pictures
        yield Engine(draw, lambda peak: _measured(lambda: cast(Limit, ray.get(actors[0].limit.remote(peak)))))
    finally:
        for one in actors:
            with contextlib.suppress(RayActorError):
                ray.kill(one)


def _measured(measure: Callable[[], Limit]) -> Limit | None:
    """A measurement, made again where it met a dying replica."""
    for attempt in range(TRIES):
        try:
            return measure()
        except LOST:
            time.sleep(0.5 * 2**attempt)
    return None


def ask(engine: Engine, requests: list[DrawRequest]) -> Sequence[Drawing | Exception]:
    """Have a batch drawn, again where it met a dying replica; one that goes on failing is asked for one by one."""
    failure: Exception
    for attempt in range(TRIES):
        try:
            return engine.draw(requests)
        except LOST as error:
            failure = error
            time.sleep(0.5 * 2**attempt)
        except Exception as error:
            failure = error
            break
    if len(requests) == 1:
        return [failure]
    return [answer for request in requests for answer in ask(engine, [request])]
