"""Which row of the data a position in training means: computed from (seed, epoch, position), never stored.

An epoch visits every row once. Parts are shuffled, then cut into windows of a few parts, and the rows of a window are
shuffled together: random enough to train, local enough to stream.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

ORDER = 4  # as masking.ORDER, which keeps the number free: without PyTorch, who decodes pictures starts in a second


class SampleOrder:
    """Positions 0, 1, 2, ... of the training stream to global row numbers.

    Args:
        sizes: rows of every part, in the order of the store.
        seed: the run's seed.
        window: parts whose rows are shuffled together.
    """

    def __init__(self, sizes: Sequence[int], seed: int, window: int = 8) -> None:
        self.sizes = list(sizes)
        self.starts = [0, *accumulate(sizes)]
        self.seed = seed
        self.window = window
        self._windows = lru_cache(maxsize=4)(self._shuffled_window)
        self._epoch = lru_cache(maxsize=2)(self._shuffled_parts)

    def __len__(self) -> int:
        return self.starts[-1]

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Global rows (B,) of stream positions (B,)."""
        rows = np.empty(len(positions), dtype=np.int64)
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        for epoch in np.unique(epochs).tolist():
            _, ends = self._epoch(epoch)
            here = np.nonzero(epochs == epoch)[0]
            numbers = np.searchsorted(ends, places[here], side="right")
            for number in np.unique(numbers).tolist():
                of_window = here[numbers == number]
                first = int(ends[number - 1]) if number else 0
                rows[of_window] = self._windows(epoch, number)[places[of_window] - first]
        return rows

    def _shuffled_parts(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The epoch's windows of parts, and where in the epoch each window ends."""
        parts = self._generator(epoch, 0).permutation(len(self.sizes))
        windows = [parts[first : first + self.window] for first in range(0, len(parts), self.window)]
        ends = np.cumsum([sum(self.sizes[part] for part in window) for window in windows])
        return windows, ends

    def _shuffled_window(self, epoch: int, number: int) -> NDArray[np.int64]:
        parts = self._epoch(epoch)[0][number]
        rows = np.concatenate([np.arange(self.starts[part], self.starts[part + 1]) for part in parts])
        return self._generator(epoch, number + 1).permutation(rows)

    def _generator(self, epoch: int, number: int) -> np.random.Generator:
        counter = np.array([0, number, epoch, ORDER], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(counter=counter, key=np.array([self.seed, 0], dtype=np.uint64)))


def share_size(batch_size: int, world: int, rows: int = 1) -> int:
    """Rows of a step that each rank holds, padding included: so many `rows` at a time as it takes."""
    return -(-batch_size // (rows * world)) * rows


def share(
    step: int, batch_size: int, rank: int, world: int, rows: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """This rank's stream positions of a step, and their weights.

    Where the world size does not divide the batch, the last ranks are padded with rows of weight 0, so that every
    rank holds equally many. The step is cut between `rows` of it, the same ones in every world.
    """
    size = share_size(batch_size, world, rows)
    places = np.arange(rank * size, (rank + 1) * size)
    weights = (places < batch_size).astype(np.float32)
    return step * batch_size + np.minimum(places, batch_size - 1), weights
