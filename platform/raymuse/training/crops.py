"""The chunks of a training that encodes as it runs: chunk n holds the crops of positions n C to (n + 1) C - 1.

Which picture a position means, where it is cut and whether it is mirrored are computed from (seed, epoch, position):
a chunk can be made anywhere, in any order, and any number of times. Imports no torch: a decoder starts in a second.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from raymuse.config.pretokenize import StreamConfig
from raymuse.config.training import MaskedConfig
from raymuse.encoding.chunks import Chunk, facts_of
from raymuse.encoding.pictures import crop, crop_rng, keep_memory, read_header, read_pixels
from raymuse.encoding.survey import FOLDER, Survey
from raymuse.storage.rejects import Reject, Unreadable
from raymuse.training.order import SampleOrder


@dataclass(frozen=True)
class CropPlan:
    """Small and picklable.

    Args:
        stream: how pictures are read and cut; C is its `chunk_size`.
        survey: folder of the survey.
        seed: of the order of the rows.
        batch_size: positions a step.
        steps: of the training.
    """

    stream: StreamConfig
    survey: str
    seed: int
    batch_size: int
    steps: int

    @classmethod
    def of(cls, config: MaskedConfig) -> "CropPlan":
        assert config.stream is not None
        return cls(config.stream, survey_folder(config), config.seed, config.batch_size, config.steps)

    @cached_property
    def found(self) -> Survey:
        return Survey(self.survey)

    @cached_property
    def order(self) -> SampleOrder:
        """The order that token shards of these pictures would be read in."""
        return SampleOrder(self.found.sizes, self.seed)

    @property
    def positions(self) -> int:
        """Of the whole training."""
        return self.steps * self.batch_size

    def covers(self, number: int) -> NDArray[np.int64]:
        """The positions of a chunk."""
        size = self.stream.chunk_size
        return np.arange(number * size, min((number + 1) * size, self.positions))

    def chunks(self, first: int, stop: int) -> range:
        """The chunks that hold positions `first` to before `stop`."""
        return range(first // self.stream.chunk_size, -(-stop // self.stream.chunk_size))

    def chunk(self, number: int) -> Chunk:
        """The crops of a chunk, read and decoded now; `crop` of its facts is the place in the chunk.

        A picture that cannot be used is a reject, and leaves its place empty. Raises OSError: trying again may help.
        """
        keep_memory()
        positions = self.covers(number)
        chunk = Chunk(number, self.stream.shapes[0])
        noticed: Counter[str] = Counter()
        rows = self.order.rows(positions).tolist()
        epochs = (positions // len(self.order)).tolist()
        for place, (row, epoch) in enumerate(zip(rows, epochs, strict=True)):
            try:
                noticed.update(self._cut(chunk, place, row, epoch))
            except Unreadable as error:
                (key,) = self.found.keys([row])
                chunk.rejects.append(Reject(self.found.source(row), key, error.reason, error.detail))
        chunk.counts = dict(noticed)
        return chunk

    def _cut(self, chunk: Chunk, place: int, row: int, epoch: int) -> tuple[str, ...]:
        """Put one crop into the chunk; what was noticed and mended."""
        picture, stream = self.found.picture(row), self.stream
        image = read_header(picture.data, max_pixels=stream.max_pixels)
        decoded = read_pixels(image, stream.background_rgb)
        draw = crop_rng(stream.seed, picture.key, epoch)
        cut = crop(decoded.image, chunk.shape, mode=stream.crop, rng=draw)
        flip = stream.flip and bool(draw.random() < 0.5)
        chunk.pixels.append(cut.pixels[:, ::-1] if flip else cut.pixels)
        chunk.facts.append(facts_of(picture, picture.captions, cut, place, flip, self.found.source(row), stream))
        return decoded.notes


def survey_folder(config: MaskedConfig) -> str:
    """Where the survey of a training lies."""
    return f"{config.output}/{FOLDER}"


def mine(positions: NDArray[np.int64], batch_size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Those of ascending positions that a rank reads: as `order.share`, padding included."""
    size = -(-batch_size // world)
    places = positions % batch_size
    padded = (rank + 1) * size > batch_size
    wanted: NDArray[np.bool_] = (places // size == rank) | (padded & (places == batch_size - 1))
    return positions[wanted]
