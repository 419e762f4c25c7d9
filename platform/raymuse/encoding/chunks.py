"""A shard's pictures as chunks of crops: fixed in size and order, whatever ran before; so encoding repeats exactly.

N crops of a chunk, H W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.pictures import Crop, crop, crop_rng, decode
from raymuse.storage.images import Picture, Shard, read_shard
from raymuse.storage.rejects import Reject, Unreadable


@dataclass(frozen=True)
class CropFacts:
    """What a token row says beside the ids."""

    key: str
    captions: tuple[str, ...]
    original_width: int
    original_height: int
    crop_top: int
    crop_left: int
    aesthetic: float
    flip: bool
    crop: int
    source: str


@dataclass
class Chunk:
    """Up to `chunk_size` crops, uint8 (N, H, W, 3), and the rows refused while they were gathered."""

    number: int
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    facts: list[CropFacts] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    last: bool = False


def decode_chunks(shard: Shard, config: PretokenizeConfig) -> Iterator[Chunk]:
    """Read, decode and crop a shard; the last chunk says so, and may be empty. One bad row costs only itself."""
    chunk = Chunk(0)
    for row in read_shard(shard):
        if isinstance(row, Reject):
            chunk.rejects.append(row)
            continue
        try:
            crops = _crops(row, config)
        except Unreadable as error:
            chunk.rejects.append(Reject(shard.name, row.key, error.reason, error.detail))
            continue
        for number, flip, cut in crops:
            if len(chunk.facts) == config.chunk_size:
                yield chunk
                chunk = Chunk(chunk.number + 1)
            chunk.pixels.append(cut.pixels[:, ::-1] if flip else cut.pixels)
            chunk.facts.append(_facts(row, cut, number, flip, shard.name, config.aesthetic))
    chunk.last = True
    yield chunk


def _crops(picture: Picture, config: PretokenizeConfig) -> list[tuple[int, bool, Crop]]:
    """Every crop of a picture, each with its mirrored twin where asked for."""
    image = decode(picture.data, max_pixels=config.max_pixels)
    cuts = [
        crop(image, config.resolution, mode=config.crop, rng=crop_rng(config.seed, picture.key, number))
        for number in range(config.crops_per_picture)
    ]
    flips = (False, True) if config.flip else (False,)
    return [(number, flip, cut) for number, cut in enumerate(cuts) for flip in flips]


def _facts(picture: Picture, cut: Crop, number: int, flip: bool, source: str, aesthetic: float) -> CropFacts:
    said: dict[str, Any] = picture.metadata
    return CropFacts(
        key=picture.key,
        captions=picture.captions,
        original_width=_size(said, "original_width", cut.original_width),
        original_height=_size(said, "original_height", cut.original_height),
        crop_top=cut.top,
        crop_left=cut.left,
        aesthetic=_number(said.get("aesthetic"), aesthetic),
        flip=flip,
        crop=number,
        source=source,
    )


def _size(said: dict[str, Any], name: str, measured: int) -> int:
    """The size before any earlier resize, where the metadata knows it."""
    value = said.get(name)
    return int(value) if isinstance(value, int | float) and value > 0 else measured


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
