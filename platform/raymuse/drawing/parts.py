"""A batch that is too large for a GPU's memory is done in parts."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from raymuse.config.errors import UserError


class Parts:
    """In how many parts a kind of work is done, found by trying: 1, and after memory has run out 2, 4, ...

    Args:
        name: of the work, for what is said of it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 1

    def run(self, rows: int, work: Callable[[slice], Tensor]) -> Tensor:
        """What `work` makes of all rows, joined. It may be called again for rows that it has done.

        Raises:
            UserError: one row alone is too much.
        """
        while True:
            try:
                done = [work(part) for part in self._slices(rows)]
                return done[0] if len(done) == 1 else torch.cat(done)
            except torch.OutOfMemoryError as error:
                if self.count >= rows:
                    raise UserError(
                        f"{self.name}: not even one picture fits into the memory of the device. Draw smaller pictures, "
                        "in a lower precision, or where there is more memory."
                    ) from error
            # Only here, after the handler: its traceback holds on to what the work had taken.
            torch.cuda.empty_cache()
            self.count *= 2
            warnings.warn(
                f"{self.name}: {rows} rows at once do not fit into the memory of the device; from now on they are done "
                f"in {self.count} parts",
                stacklevel=2,
            )

    def _slices(self, rows: int) -> list[slice]:
        size = -(-rows // self.count)
        return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
