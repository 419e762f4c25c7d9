"""One answer for many who ask."""

import asyncio

import pytest

from raymuse.serving.once import Once


def test_many_who_ask_within_the_time_cost_one_question() -> None:
    asked: list[int] = []

    async def question() -> int:
        asked.append(len(asked))
        await asyncio.sleep(0.01)
        if asked[-1] == 1:
            raise ValueError("nobody knows")
        return asked[-1]

    async def all_of_them() -> None:
        once = Once(0.2, question)
        assert await asyncio.gather(*(once() for _ in range(9))) == [0] * 9
        assert await once() == 0
        await asyncio.sleep(0.2)
        for _ in range(2):  # a failure is kept as long as an answer
            with pytest.raises(ValueError, match="nobody knows"):
                await once()
        await asyncio.sleep(0.2)
        leaving = asyncio.ensure_future(once())
        staying = asyncio.ensure_future(once())
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying == 2
        assert asked == [0, 1, 2]

    asyncio.run(all_of_them())
