"""One model behind the API: how much may be asked of it, within which time, and what happens when a replica dies."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from raymuse.config.errors import UserError
from raymuse.serving.asked import LOST, Drawing, DrawRequest
from raymuse.serving.protocol import Refused
from raymuse.serving.room import Room
from raymuse.serving.watch import metrics

AGAIN_SECONDS, TRIES = 0.2, 7
DIED = "one replica after the other died of this request"


class Served:
    """A model's replicas.

    Args:
        generator: reaches them.
        most: pictures of it that may be on their way at a time; more are answered 429.
        deadline: seconds until a request is answered 504.
    """

    def __init__(self, generator: DeploymentHandle, most: int, deadline: float) -> None:
        self.generator, self.deadline, self.room = generator, deadline, Room(most)

    async def describe(self) -> dict[str, int]:
        """Sides of its pictures, and how many of them one replica has on its way."""
        return dict(await self.generator.describe.remote())

    async def draw(self, wanted: Sequence[DrawRequest]) -> list[Drawing]:
        """All pictures of a request.

        Raises:
            Refused: there is no room for them, they are not done in time, cannot be drawn, or the checker refuses one.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        with self.room.admitted(len(wanted)), told():
            async with asyncio.timeout(self.deadline):
                tasks = [asyncio.ensure_future(self._one(each)) for each in wanted]
                try:
                    drawn = await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()  # those that are done do not mind
        self.room.note(loop.time() - began)
        return _passed(drawn)

    async def stream(self, wanted: DrawRequest, partials: int) -> AsyncGenerator[NDArray[np.uint8] | Drawing]:
        """Partial pictures, then the whole one; what is raised is as for `draw`."""
        until = asyncio.get_running_loop().time() + self.deadline
        with self.room.admitted(1), told():
            async with aclosing(self._steps(wanted, partials)) as steps:
                while True:
                    async with asyncio.timeout_at(until):
                        drawn = await anext(steps)
                    if isinstance(drawn, Drawing):
                        yield _passed([drawn])[0]
                        return
                    yield drawn

    async def _one(self, wanted: DrawRequest) -> Drawing:
        """One picture; asked for again where its replica died."""
        for attempt in range(TRIES):
            response = self.generator.draw.remote(wanted)
            try:
                drawing: Drawing = await response
                return drawing
            except LOST:
                await asyncio.sleep(AGAIN_SECONDS * 2**attempt)
            except BaseException:
                response.cancel()  # nobody waits for it any more
                raise
        raise Refused(500, DIED, "server_error")

    async def _steps(self, wanted: DrawRequest, partials: int) -> AsyncGenerator[NDArray[np.uint8] | Drawing]:
        """Partial pictures and the whole one; where the replica dies another one goes on."""
        shown = 0
        for attempt in range(TRIES):
            stream: Any = self.generator.options(stream=True).draw_stream.remote(wanted, partials)
            number = 0
            try:
                async for drawn in stream:
                    if number >= shown:
                        yield drawn
                        shown += 1
                    number += 1
                return
            except LOST:
                await asyncio.sleep(AGAIN_SECONDS * 2**attempt)
            except BaseException:
                stream.cancel()
                raise
        raise Refused(500, DIED, "server_error")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What goes wrong with the drawing as what a client is told of it."""
    try:
        yield
    except UserError as error:
        raise Refused(400, str(getattr(error, "cause", error))) from error
    except TimeoutError as error:
        raise Refused(504, "the pictures were not done in time: ask for fewer, or later", "server_error") from error


def blocked(message: str) -> Refused:
    """What a filter refuses, as OpenAI says it."""
    return Refused(400, message, "image_generation_user_error", code="moderation_blocked")


def _passed(drawn: list[Drawing]) -> list[Drawing]:
    """The same; Refused where the checker refuses one of them. Why is for the server's people, not for the client."""
    if refused := sum(one.refused is not None for one in drawn):
        metrics().refused.inc(refused)
        raise blocked(f"{refused} of {len(drawn)} pictures were refused by this server's checker")
    metrics().pictures.inc(len(drawn))
    return drawn
