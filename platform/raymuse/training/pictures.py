"""Pictures straight from image shards, in the training stream's order: for the VQGAN and CLIP."""

import sys

import numpy as np
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.encoding.pictures import crop, crop_rng, decode
from raymuse.storage.images import list_shards
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.rejects import Unreadable
from raymuse.training.order import SampleOrder


class PictureStream:
    """Random access to crops and captions by stream position.

    A picture that cannot be decoded is replaced by its successor in the index, and said once.

    Raises:
        UserError: where the shards hold no readable picture.
    """

    def __init__(self, address: str, seed: int) -> None:
        self.index = PictureIndex(list_shards(address))
        if len(self.index) == 0:
            raise UserError(f"{address} holds no readable picture: {self.index.refused()}.")
        self.order = SampleOrder([len(self.index)], seed)
        self.seed = seed
        self._unreadable: set[int] = set()

    def keys(self, positions: NDArray[np.int64]) -> list[str]:
        """Keys of the pictures at stream positions."""
        return [self.index.key(int(row)) for row in self.order.rows(positions)]

    def crops(
        self, positions: NDArray[np.int64], short_sides: NDArray[np.int64], side: int
    ) -> tuple[NDArray[np.uint8], list[str]]:
        """Square crops uint8 (B, side, side, 3), each from its picture resized to a short side, and their captions."""
        pixels, captions = [], []
        for position, row, short in zip(positions, self.order.rows(positions), short_sides, strict=True):
            picture, caption = self._crop(int(row), int(position), int(short), side)
            pixels.append(picture)
            captions.append(caption)
        return np.stack(pixels), captions

    def _crop(self, row: int, position: int, short: int, side: int) -> tuple[NDArray[np.uint8], str]:
        for number in range(row, row + len(self.index)):
            picture = self.index[number % len(self.index)]
            try:
                image = decode(picture.data)
                rng = crop_rng(self.seed, picture.key, position)
                whole = crop(image, short, mode="random", rng=rng).pixels
            except Unreadable as error:
                self._say_once(number % len(self.index), picture.key, error)
                continue
            top, left = (int(rng.integers(short - side + 1)) for _ in range(2))
            return whole[top : top + side, left : left + side], picture.captions[0]
        raise UserError("not one picture of the shards can be decoded: look at them with `raymuse pretokenize`.")

    def _say_once(self, number: int, key: str, error: Unreadable) -> None:
        if number not in self._unreadable:
            self._unreadable.add(number)
            print(f"warning: {key}: {error}; the next picture takes its place.", file=sys.stderr)
