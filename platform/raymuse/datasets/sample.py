"""One captioned picture of a data set that the project draws itself."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from raymuse.config.errors import UserError


class Sample(NamedTuple):
    """A picture (RGB), its caption and its key, which is free of dots and slashes as a shard's member names must be."""

    key: str
    image: Image.Image
    caption: str


def sample_key(index: int) -> str:
    return f"{index:09d}"


def sample_generator(seed: int, index: int) -> np.random.Generator:
    """The random numbers of picture `index` alone, so that any worker can draw any picture in any order."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))


def check_request(count: int, start: int, resolution: int) -> None:
    """Refuse counts below zero and pictures too small to tell shapes apart.

    Raises:
        UserError: naming the value at fault.
    """
    if count < 0 or start < 0:
        raise UserError(f"cannot draw {count} pictures from number {start} on: both must be 0 or more")
    if resolution < 24:
        raise UserError(f"a resolution of {resolution} px is too small to tell shapes apart: use 24 or more")
