"""A shard's pictures as chunks of crops: fixed in size and order, whatever ran before; so encoding repeats exactly.

N crops of a chunk, H W pixels.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymuse.config.pretokenize import EncodingConfig, PretokenizeConfig
from raymuse.encoding.filters import AESTHETIC, check_metadata, check_size, fitting_captions, number, original_size
from raymuse.encoding.pictures import Crop, crop, crop_rng, keep_memory, read_header, read_pixels
from raymuse.storage.images import Picture, Reading, Shard, read_shard
from raymuse.storage.rejects import Reject, Unreadable

Shape = tuple[int, int]


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
    """Up to `chunk_size` crops of one shape, uint8 (N, H, W, 3), and what happened while they were gathered.

    Args:
        number: counted from 0 over the chunks of a shard, whatever their shapes.
        shape: (H, W) of its crops, pixels: one of the config's shapes.
        rejects: rows refused.
        counts: what was noticed and mended, by name (animations, captions_repaired, ...), to be summed; `pictures`
            are those that gave crops.
        last: of the shard.
    """

    number: int
    shape: Shape
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    facts: list[CropFacts] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    last: bool = False


def reading_of(config: EncodingConfig) -> Reading:
    """How the config wants its input read."""
    return Reading(
        image_column=config.image_column,
        caption_column=config.caption_column,
        caption_prefix=config.caption_prefix,
        repair_captions=config.bad_captions == "repair",
        split=config.split,
    )


def decode_chunks(shard: Shard, config: PretokenizeConfig, drop: Mapping[str, Reject] = {}) -> Iterator[Chunk]:
    """Read, decode and crop a shard. One bad row costs only itself.

    A chunk comes when it is full, or has no room for the crops of the next picture, which stay together; those that
    are open at the end come in the order of the config's shapes. The last says so, and may be empty. Rejects and
    counts ride with the next chunk that comes.

    Args:
        shard: of `list_shards`.
        config: with `shard` and `drop` it decides every byte of the chunks.
        drop: by key, pictures to leave out undecoded, and the reject that says why.
    """
    keep_memory()
    gathering = _Gathering(config)
    for row in read_shard(shard, reading_of(config)):
        if isinstance(row, Reject):
            gathering.rejects.append(row)
            continue
        if row.key in drop:
            gathering.rejects.append(drop[row.key])
            continue
        try:
            image, captions = admit(row, config)
            decoded = read_pixels(image, config.background_rgb)
            shape = nearest_shape(decoded.image.size, config.shapes)
            crops = _crops(decoded.image, row.key, shape, config)
        except Unreadable as error:
            gathering.rejects.append(Reject(shard.name, row.key, error.reason, error.detail))
            continue
        left_out = len(row.captions) - len(captions)
        gathering.count({"pictures": 1, "captions_left_out": left_out, **Counter([*row.notes, *decoded.notes])})
        yield from gathering.add(
            shape,
            [cut.pixels[:, ::-1] if flip else cut.pixels for _, flip, cut in crops],
            [facts_of(row, captions, cut, index, flip, shard.name, config) for index, flip, cut in crops],
        )
    yield from gathering.rest()


def admit(picture: Picture, config: EncodingConfig) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture with its header read and no pixel decoded, and the captions that the filters leave it.

    What costs least is asked first: the metadata, the captions, the header.

    Raises:
        Unreadable: a filter leaves it out, or its header says that it cannot be used.
    """
    check_metadata(picture.metadata, config.filters)
    captions = fitting_captions(picture.captions, config.filters, config.caption_prefix)
    original = original_size(picture.metadata)
    if original is not None:
        check_size(original, config.filters)
    image = read_header(picture.data, max_pixels=config.max_pixels)
    if original is None:
        check_size(image.size, config.filters)
    return image, captions


def nearest_shape(size: tuple[int, int], shapes: tuple[Shape, ...]) -> Shape:
    """Of the shapes (H, W) the one nearest to a picture's (width, height) in log aspect ratio; of equals the first."""
    if len(shapes) == 1:
        return shapes[0]

    def distance(shape: Shape) -> Fraction:  # exact, where logarithms would let rounding break a tie
        ours, theirs = size[0] * shape[0], size[1] * shape[1]
        return Fraction(max(ours, theirs), min(ours, theirs))

    return min(shapes, key=distance)


class _Gathering:
    """The open chunks of a shard, one a shape, and the rejects and counts that wait for the next to come."""

    def __init__(self, config: PretokenizeConfig) -> None:
        self.shapes, self.size = config.shapes, config.chunk_size
        self.open: dict[Shape, Chunk] = {}
        self.rejects: list[Reject] = []
        self.counts: Counter[str] = Counter()
        self.closed = 0
        self.full: Chunk | None = None  # waits for one picture more: without one, it is the last

    def count(self, noticed: Mapping[str, int]) -> None:
        self.counts.update({name: times for name, times in noticed.items() if times})

    def add(self, shape: Shape, pixels: Sequence[NDArray[np.uint8]], facts: Sequence[CropFacts]) -> Iterator[Chunk]:
        """Put a picture's crops into the chunk of their shape; yields what was full before, or has no room for them."""
        if self.full is not None:
            yield self.full
            self.full = None
        if shape in self.open and len(self.open[shape].facts) + len(facts) > self.size:
            yield self._close(shape)
        chunk = self.open.setdefault(shape, Chunk(-1, shape))
        chunk.pixels += pixels
        chunk.facts += facts
        if len(chunk.facts) == self.size:
            self.full = self._close(shape)

    def rest(self) -> Iterator[Chunk]:
        """The full chunk that waits and those that never became full; at least one, and the last says so."""
        chunks = [] if self.full is None else [self.full]
        chunks += [self._close(shape) for shape in self.shapes if shape in self.open]
        chunks = chunks or [Chunk(self.closed, self.shapes[0])]
        last = chunks[-1]
        last.rejects += self.rejects
        last.counts = dict(Counter(last.counts) + self.counts)
        last.last = True
        yield from chunks

    def _close(self, shape: Shape) -> Chunk:
        chunk = self.open.pop(shape)
        chunk.number, chunk.rejects, chunk.counts = self.closed, self.rejects, dict(self.counts)
        self.closed, self.rejects, self.counts = self.closed + 1, [], Counter()
        return chunk


def _crops(image: Image.Image, key: str, shape: Shape, config: PretokenizeConfig) -> list[tuple[int, bool, Crop]]:
    """Every crop of a picture with its number, each with its mirrored twin where asked for."""
    random = config.crop == "random"
    cuts = [
        crop(image, shape, mode=config.crop, rng=crop_rng(config.seed, key, index) if random else None)
        for index in range(config.crops_per_picture)
    ]
    flips = (False, True) if config.flip else (False,)
    return [(index, flip, cut) for index, cut in enumerate(cuts) for flip in flips]


def facts_of(
    picture: Picture,
    captions: tuple[str, ...],
    cut: Crop,
    index: int,
    flip: bool,
    source: str,
    config: EncodingConfig,
) -> CropFacts:
    """What a row of a crop says beside its ids."""
    width, height = original_size(picture.metadata) or (cut.original_width, cut.original_height)
    aesthetic = number(picture.metadata, AESTHETIC)
    return CropFacts(
        key=picture.key,
        captions=captions,
        original_width=width,
        original_height=height,
        crop_top=cut.top,
        crop_left=cut.left,
        aesthetic=config.aesthetic if aesthetic is None else aesthetic,
        flip=flip,
        crop=index,
        source=source,
    )
