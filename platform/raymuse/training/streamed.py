"""Rows of a training that encodes as it runs, by position, out of encoded chunks as they come in.

Who makes the chunks is another matter: Ray Data on other machines (`tokenizing/feed.py`), or this process.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.config.training import MaskedConfig
from raymuse.encoding.encoder import ChunkEncoder, Encoded
from raymuse.storage.tokens import Captions, Rows, TokenPart, join_rows, part_of, take_rows
from raymuse.training.crops import CropPlan, mine, survey_folder
from raymuse.training.engine import rank_and_world

REJECTS = "rejects.jsonl"
STRETCH = 4096  # chunks that are asked for at once: a Ray Data execution


@dataclass(frozen=True)
class Piece:
    """What one rank needs of an encoded chunk.

    Attributes:
        number: of the chunk.
        positions: (N,) of the training stream, ascending.
        rows: (N,) of `part`; -1 where a picture could not be used.
        part: None where none could.
        rejects: of the whole chunk, with rank 0's piece alone: (source, key, reason, detail).
    """

    number: int
    positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    part: TokenPart | None
    rejects: tuple[tuple[str, str, str, str], ...] = ()


Pieces = Callable[[int, int], Iterator[Piece]]
"""From a position (a step's first) to before another: this rank's piece of every chunk, in order. Called on all ranks
at the same step."""


def piece_of(plan: CropPlan, number: int, encoded: Encoded, rank: int, world: int) -> Piece:
    """A rank's piece of a chunk."""
    covered = plan.covers(number)
    positions = mine(covered, plan.batch_size, rank, world)
    places = encoded.tokens["crop"].to_numpy()
    at = np.full(len(covered), -1, dtype=np.int64)
    at[places] = np.arange(len(places))
    wanted = at[positions - covered[0]]
    taken = encoded.tokens.take(pa.array(wanted[wanted >= 0]))
    rows = np.full(len(positions), -1, dtype=np.int64)
    rows[wanted >= 0] = np.arange(len(taken))
    rejects = tuple(tuple(reject.values()) for reject in encoded.rejects.to_pylist()) if rank == 0 else ()
    if not len(taken):
        return Piece(number, positions, rows, None, rejects)
    used = pc.unique(taken["caption_ids"].combine_chunks().flatten())
    captions = encoded.captions.filter(pc.is_in(encoded.captions["caption_id"], value_set=used))
    return Piece(number, positions, rows, part_of(taken, Captions.of(captions), f"chunk {number}"), rejects)


def here(plan: CropPlan) -> Pieces:
    """Chunks decoded and encoded in this process, each as it is needed: for a debugger, or one small machine."""

    def pieces(first: int, stop: int) -> Iterator[Piece]:
        rank, world = rank_and_world()
        encoder = ChunkEncoder(plan.stream, plan.stream.device)
        for number in plan.chunks(first, stop):
            if len(mine(plan.covers(number), plan.batch_size, rank, world)):
                yield piece_of(plan, number, encoder(plan.chunk(number)), rank, world)

    return pieces


class Streamed:
    """What a training reads in place of a token store: the same rows, in the same order.

    Args:
        config: with `stream`.
        pieces: None: encoded in this process.

    Raises:
        UserError: there is no survey of the pictures.
    """

    def __init__(self, config: MaskedConfig, pieces: Pieces | None) -> None:
        self.config = config
        self.plan = CropPlan.of(config)
        self.survey = self.plan.found
        self.sizes = self.survey.sizes
        self.empty = self.survey.empty
        self.refused: set[tuple[str, str]] = set()
        self._pieces = here(self.plan) if pieces is None else pieces
        steps = max(1, STRETCH * self.plan.stream.chunk_size // config.batch_size)
        self._stretch = steps * config.batch_size  # all ranks come to its end at the same step
        self._coming: Iterator[Piece] | None = None
        self._stop = 0
        self._held: list[Piece] = []

    def __len__(self) -> int:
        return len(self.survey)

    @property
    def has_states(self) -> bool:
        return self.empty.text_states is not None

    def codes(self, column: str) -> int:
        """Size of the codebook that `image_ids` or `low_ids` index."""
        return int(self.survey.facts["codebook_size" if column == "image_ids" else "low_codebook_size"])

    def grid(self, column: str) -> tuple[int, int]:
        """(height, width) of the ids in `image_ids` or `low_ids`."""
        if (grid := self.survey.facts["grid" if column == "image_ids" else "low_grid"]) is None:
            raise UserError(f"stream.low_resolution is not set, so there are no {column}: super-resolution needs it.")
        return int(grid[0]), int(grid[1])

    def keys(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        return self.survey.keys(rows)

    @property
    def rejects(self) -> int:
        """Pictures that could not be used so far, those that the survey found among them. On rank 0 alone."""
        return sum(self.survey.rejects.values()) + len(self.refused)

    def at(self, positions: NDArray[np.int64], draws: NDArray[np.float64]) -> Rows:
        """Rows at ascending stream positions (B,), which no call takes back; empty places are not `sound`."""
        batch = self.plan.batch_size
        first = int(positions[0])
        if self._coming is None or first >= self._stop:
            begin = first // batch * batch
            self._stop = min(begin + self._stretch, self.plan.positions)
            self._coming, self._held = self._pieces(begin, self._stop), []
        self._held = [piece for piece in self._held if piece.positions[-1] >= first]
        while not self._held or self._held[-1].positions[-1] < positions[-1]:
            piece = next(self._coming, None)
            if piece is None:
                raise RuntimeError(f"the stream ended before position {positions[-1]}")
            self._note(piece)
            if len(piece.positions) and piece.positions[-1] >= first:
                self._held.append(piece)
        return self._joined(positions, draws)

    def first(self, count: int) -> Rows:
        """The first crops of the stream, encoded in this process; fewer where pictures could not be used."""
        encoder = ChunkEncoder(self.plan.stream, self.plan.stream.device)
        found: list[Rows] = []
        for number in self.plan.chunks(0, min(count, self.plan.positions)):
            piece = piece_of(self.plan, number, encoder(self.plan.chunk(number)), 0, 1)
            rows = piece.rows[(piece.rows >= 0) & (piece.positions < count)]
            if piece.part is not None and len(rows):
                found.append(take_rows(piece.part, rows, np.zeros(len(rows))))
        if not found:
            return self._blank(count)
        return join_rows(found, np.arange(sum(len(rows.micro) for rows in found)))

    def _joined(self, positions: NDArray[np.int64], draws: NDArray[np.float64]) -> Rows:
        found: list[Rows] = []
        where: list[NDArray[np.int64]] = []
        sound = np.zeros(len(positions), dtype=np.bool_)
        for piece in self._held:
            places = np.searchsorted(piece.positions, positions)
            there = np.nonzero(piece.positions[np.minimum(places, len(piece.positions) - 1)] == positions)[0]
            rows = piece.rows[places[there]]
            there, rows = there[rows >= 0], rows[rows >= 0]
            if piece.part is not None and len(there):
                found.append(take_rows(piece.part, rows, draws[there]))
                where.append(there)
                sound[there] = True
        missing = np.nonzero(~sound)[0]
        if len(missing):
            found.append(self._blank(len(missing)))
            where.append(missing)
        return replace(join_rows(found, np.concatenate(where)), sound=sound)

    def _blank(self, count: int) -> Rows:
        """Rows that stand in empty places."""
        low = self.survey.facts["low_grid"]
        states, pooled = (
            None if value is None else np.repeat(value.astype(np.float32), count, axis=0)
            for value in (self.empty.text_states, self.empty.pooled)
        )
        return Rows(
            image_ids=np.zeros((count, *self.grid("image_ids")), dtype=np.int64),
            low_ids=None if low is None else np.zeros((count, *low), dtype=np.int64),
            micro=np.zeros((count, 5), dtype=np.float32),
            text_ids=np.repeat(self.empty.text_ids.astype(np.int64), count, axis=0),
            text_states=states,
            pooled=pooled,
        )

    def _note(self, piece: Piece) -> None:
        """Write down what could not be used, once a picture."""
        new = [reject for reject in piece.rejects if reject[:2] not in self.refused]
        if not new:
            return
        self.refused.update(reject[:2] for reject in new)
        with Path(survey_folder(self.config), REJECTS).open("a") as lines:
            for source, key, reason, detail in new:
                record = {"source": source, "key": key, "reason": reason, "detail": detail}
                lines.write(json.dumps(record) + "\n")
