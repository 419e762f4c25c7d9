"""The survey of the pictures that a training encodes as it runs: made once, before it starts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymuse.config.pretokenize import StreamConfig
from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.encoding.encoder import CaptionEncoder
from raymuse.encoding.plan import fingerprint, plan_of
from raymuse.encoding.survey import Found, digest, is_made, look_through, write
from raymuse.models.vqgan import Vqgan
from raymuse.storage.images import Shard
from raymuse.training.crops import survey_folder


@dataclass(frozen=True)
class Surveyor:
    """Who does the work of a survey.

    Attributes:
        look: shards looked through, in their order; the first argument is the survey's folder.
        empty: the captions table of the empty caption.
    """

    look: Callable[[str, StreamConfig, Sequence[Shard]], Iterable[Found]]
    empty: Callable[[StreamConfig], pa.Table]


def _look(address: str, stream: StreamConfig, shards: Sequence[Shard]) -> Iterable[Found]:
    return (look_through(address, stream, number, shard) for number, shard in enumerate(shards))


def encode_empty(stream: StreamConfig) -> pa.Table:
    """The captions table of the empty caption."""
    return CaptionEncoder(stream, stream.device)([""])


HERE = Surveyor(_look, encode_empty)
"""This process, shard after shard."""


def prepare(config: TrainConfig, surveyor: Surveyor = HERE) -> None:
    """Survey the pictures of a training with `stream`, where that is not done.

    Raises:
        UserError: for pictures or encoders that cannot be read, or where too many pictures are faulty.
    """
    if not isinstance(config, MaskedConfig) or config.stream is None:
        return
    address = survey_folder(config)
    shards, facts, known = _known(config.stream)
    if is_made(address, known):
        return
    found = surveyor.look(address, config.stream, shards)
    survey = write(address, known, config.stream, shards, found, surveyor.empty(config.stream), facts)
    refused = "".join(f", {count} {reason}" for reason, count in survey.rejects.items())
    print(f"{len(survey)} pictures to encode as it trains{refused}", flush=True)


def stream_digest(stream: StreamConfig) -> str:
    """What a training with `stream` reads, as one sum: its shards, how they are cut, and the encoders' weights."""
    return _known(stream)[2]


def _known(stream: StreamConfig) -> tuple[list[Shard], dict[str, Any], str]:
    """Shards, what the encoders say of themselves with the grids, and the digest of all that."""
    shards, facts = list(plan_of(stream).values()), fingerprint(stream)
    (shape,) = stream.shapes
    low = stream.low_shape(shape)
    vqgan = Vqgan.load(stream.vqgan)
    low_factor = Vqgan.load(stream.low_vqgan).factor if stream.low_vqgan else vqgan.factor
    facts["grid"] = [side // vqgan.factor for side in shape]
    facts["low_grid"] = None if low is None else [side // low_factor for side in low]
    return shards, facts, digest(shards, stream, facts)
