"""What many ask and one answer serves: asked for at most once within a time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """A question whose answer, or whose failure, is given again for a while; who asks meanwhile waits for the same.

    Args:
        seconds: how long, from when it was asked.
        ask: the question.
    """

    def __init__(self, seconds: float, ask: Callable[[], Awaitable[T]]) -> None:
        self.seconds, self.ask = seconds, ask
        self._answer: asyncio.Task[T] | None = None
        self._asked = 0.0

    async def __call__(self) -> T:
        """The answer; what the question raises."""
        now = asyncio.get_running_loop().time()
        if self._answer is None or (self._answer.done() and now - self._asked >= self.seconds):
            self._answer, self._asked = asyncio.ensure_future(self._begun()), now
        return await asyncio.shield(self._answer)  # whoever leaves does not end it for the others

    async def _begun(self) -> T:
        return await self.ask()
