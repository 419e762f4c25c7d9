"""The sampling step: masked ids to known ones, every row on a course and at a step of its own.

A picture is a function of (weights, prompt, parameters, seed): its noise is drawn up front from its own generator, so
that neither its place in a batch nor the batch itself changes it. B rows, L ids of one, S steps, C codes, N pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.config.sampling import SamplingConfig
from raymuse.drawing.graphs import StepGraphs
from raymuse.drawing.parts import Parts
from raymuse.drawing.tables import Conditions, FedBack, Means, Table
from raymuse.masking import (
    CHOICE,
    CONFIDENCE,
    fresh_steps,
    guidance_scales,
    guide,
    halton_ranks,
    masked_counts,
    reveal,
    temperatures,
    uniforms,
)

DOUBLED_CELLS = 4096  # ids up to which a guided step is one pass over twice the rows: beyond, two passes are as quick
CORE_CELLS = 512  # ids of a pass on a core: of fewer the calls cost more, of more the layers leave its cache
EIGHTHS = 8  # of the ids: the steps in which `masked_only` counts, so that there are few shapes


class TokenTransformer(Protocol):
    """What the sampling loop needs of a base or super-resolution transformer."""

    config: Any

    def precompute(self, condition: Any) -> Any: ...

    def features(
        self, ids: Tensor, condition: Any, at: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor: ...

    def head(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Course:
    """What happens to one picture at each of its steps.

    Attributes:
        remaining: ids that stay masked after the step.
        temperature: of the confidence's noise.
        guidance: scale; 1: none.
        hide: ids that are masked again before the step, bool (S, L); None: none.
        fresh: whether what guidance adds is computed anew, or kept from the last step for which it was; None: always.
    """

    remaining: Sequence[int]
    temperature: Sequence[float]
    guidance: Sequence[float]
    hide: NDArray[np.bool_] | None = None
    fresh: Sequence[bool] | None = None

    @classmethod
    def of(cls, sampling: SamplingConfig, length: int, masked: int | None = None, first: int = 0) -> "Course":
        """The steps from `first` on (counted from 0) of a sampling that began with `masked` (all) of `length` ids."""
        ratio = 1.0 if masked is None else masked / length
        scales = guidance_scales(sampling.guidance, sampling.steps, sampling.guidance_schedule, sampling.guidance_span)
        return cls(
            masked_counts(length, sampling.steps, sampling.masking, ratio)[first:],
            temperatures(sampling.temperature, sampling.steps, sampling.end_temperature)[first:],
            scales[first:],
            fresh=None if sampling.guidance_every == 1 else fresh_steps(scales[first:], sampling.guidance_every),
        )

    @property
    def guided(self) -> bool:
        return any(scale != 1 for scale in self.guidance)

    def anew(self, step: int) -> bool:
        """Whether a step asks the network under the negative prompt, too."""
        return self.guidance[step] != 1 and (self.fresh is None or self.fresh[step])

    def unknown(self, masked: int, length: int) -> list[int]:
        """How many of `length` ids are unknown at each step, the most there may be, where `masked` were at first."""
        counts = []
        for step, remaining in enumerate(self.remaining):
            hidden = 0 if self.hide is None else int(self.hide[step].sum())
            counts.append(min(length, masked + hidden))
            masked = min(counts[-1], max(1, min(remaining, counts[-1] - 1))) if remaining else 0
        return counts


@dataclass(frozen=True)
class Draws:
    """How codes are drawn and ids ordered: what all rows of a batch share."""

    top_p: float = 1.0
    top_k: int = 0
    order: str = "confidence"
    masked_only: bool = False
    decode: str = "drawn"

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Draws":
        return cls(sampling.top_p, sampling.top_k, sampling.order, sampling.masked_only, sampling.decode)


class _Kind(NamedTuple):
    """What a step of all rows does. Steps of one kind are the same calls of the same shapes.

    Attributes:
        hides: a row masks ids again before it.
        guided: a row has guidance.
        anew: a row asks under its negative prompt for it.
        most: ids a row that the head and the draw look at; 0: all.
    """

    hides: bool
    guided: bool
    anew: bool
    most: int


@torch.no_grad()
def sample_ids(
    network: TokenTransformer,
    conditional: Any,
    unconditional: Any | None,
    *,
    ids: Tensor,
    seeds: Sequence[int],
    courses: Sequence[Course],
    draws: Draws | None = None,
) -> Tensor:
    """Draw the unknown ids of B pictures, from the first step of all to the last (MaskGIT, section 3.2).

    Args:
        conditional: the network's condition for the prompts.
        unconditional: the same for the negative prompts; None where no course has guidance.
        ids: (B, h, w), the mask id where unknown; known ids come back untouched, but for those that a course hides.
        seeds: one a picture; all its noise follows from it.
        courses: one a picture; a shorter one ends earlier.

    Returns:
        ids (B, h, w), all known.
    """
    rows = Rows(network, ids.shape, draws, device=ids.device)
    rows.admit(range(len(seeds)), conditional, unconditional, ids=ids, seeds=seeds, courses=courses)
    for _ in range(max(len(course.remaining) for course in courses)):
        rows.step()
    return rows.ids


class Rows:
    """B rows of ids that one network draws, each from a prompt of its own, on its own course, at its own step.

    A step is one pass of all rows whatever they hold, of the same shapes always, and nothing in it waits for the
    device. Between steps pictures are admitted to rows. A row whose course has ended, or that is still empty, stays as
    it is.

    Args:
        shape: (B, h, w).
        at_once: rows of a pass, divides B; None: all. Passes without a picture are left out.
        draws: how codes are drawn and ids ordered.
        streams: which of a seed's streams pick codes and order them.
        critic: where `draws.order` is "critic": a network with one logit an id.
        parts: how many a pass is done in; None: as it turns out.
        graphs: whether steps are CUDA graphs.
        vectors: where `draws.decode` is "mean": what each id stands for, (C, V).

    Attributes:
        ids: (B, h, w), the mask id where still unknown.
        means: with vectors: what is decoded in the place of each id.
    """

    def __init__(
        self,
        network: TokenTransformer,
        shape: Sequence[int],
        draws: Draws | None = None,
        streams: tuple[int, int] = (CHOICE, CONFIDENCE),
        critic: TokenTransformer | None = None,
        device: torch.device | str = "cpu",
        at_once: int | None = None,
        parts: Parts | None = None,
        graphs: bool = False,
        vectors: Tensor | None = None,
    ) -> None:
        self.network, self.critic, self.draws, self.streams = network, critic, draws or Draws(), streams
        assert (self.draws.order == "critic") == (critic is not None)
        assert (self.draws.decode == "mean") == (vectors is not None)
        count, length = shape[0], math.prod(shape[1:])
        self.at_once = at_once or count
        assert count % self.at_once == 0
        self.ids = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
        self.means = None if vectors is None else Means(vectors, count, length)
        self._parts = parts or Parts("a sampling step")
        self._courses, self._at = [Course([], [], [])] * count, [0] * count
        self._unknown = [list[int]()] * count  # by step, where `masked_only`
        self._steps = torch.zeros(count, dtype=torch.int64, device=device)  # as _at
        self._conditions = Conditions(2 * count)  # a pass after the other: of the prompts, then of the negative ones
        self._judged = Conditions(count)
        self._choice = Table(count, (length,), torch.float64, 0.5, device)
        self._confidence = Table(count, (length,), torch.float64, 0.5, device)
        self._remaining = Table(count, (), torch.int64, 0, device)
        self._heat = Table(count, (), torch.float64, 0.0, device)
        self._scale = Table(count, (), torch.float32, 1.0, device)
        self._hide = Table(count, (length,), torch.bool, False, device)
        self._fresh = Table(count, (), torch.bool, True, device)
        self._priority = torch.zeros(count, length, dtype=torch.float64, device=device)
        self._added: Tensor | None = None  # (B, L, C): what guidance adds, where a course keeps it
        self._half = False  # whether logits come in fp16
        self._finite = torch.ones(count, dtype=torch.bool, device=device)  # whether all of a row's did, where they do
        self._feeds = bool(getattr(network.config, "self_conditioning", False))
        assert not (graphs and self._feeds), "what is fed back begins and is replaced elsewhere"
        self._graphs = StepGraphs(self._run, self._changing) if graphs else None
        self._fed = FedBack(2 * count)  # as _conditions

    def ended(self, row: int) -> bool:
        """Whether a row's picture has no step left."""
        return self._at[row] >= len(self._courses[row].remaining)

    def clear(self, row: int) -> None:
        """Forget a row's picture: its steps cost its neighbours nothing any more."""
        self._courses[row], self._at[row] = Course([], [], []), 0

    def require_finite(self, rows: Sequence[int]) -> None:
        """Raise UserError where a logit of one of these rows' pictures was infinite or no number, in fp16."""
        if self._half and not bool(self._finite[list(rows)].all()):
            raise UserError(
                "the numbers of this model grow beyond what fp16 can hold: draw with precision bf16, or fp32."
            )

    @torch.no_grad()
    def admit(
        self,
        rows: Sequence[int],
        conditional: Any,
        unconditional: Any | None,
        judged: Any | None = None,
        *,
        ids: Tensor,
        seeds: Sequence[int],
        courses: Sequence[Course],
    ) -> None:
        """Begin N pictures in N rows; what those held is forgotten.

        Args:
            conditional, unconditional: for N samples or more, of which the first N count; the second may be None where
                no course has guidance.
            judged: the critic's condition for the same.
            ids: (N, h, w).
        """
        index = torch.tensor(list(rows), device=self.ids.device)
        told = index + index // self.at_once * self.at_once  # where the row's conditions lie
        self._conditions.put(told, self.network.precompute(conditional))
        if unconditional is not None:
            self._conditions.put(told + self.at_once, self.network.precompute(unconditional))
        if self.critic is not None:
            self._judged.put(index, self.critic.precompute(judged))
        self._fed.forget(torch.cat([told, told + self.at_once]))
        self.ids[index], self._steps[index], self._finite[index] = ids, 0, True
        if self.means is not None:
            self.means.begin(index, ids.flatten(1))
        length = self._priority.shape[1]
        masked = (ids == int(self.network.config.mask_id)).flatten(1).sum(1).tolist() if self.draws.masked_only else []
        for place, (row, course) in enumerate(zip(rows, courses, strict=True)):
            self._courses[row], self._at[row] = course, 0
            self._unknown[row] = course.unknown(masked[place], length) if masked else []

        steps = max(1, *(len(course.remaining) for course in courses))
        choice, confidence = (_noise(seeds, stream, steps, length) for stream in self.streams)
        moved = [
            self._choice.put(index, choice),
            self._confidence.put(index, confidence),
            self._remaining.put(index, [course.remaining for course in courses]),
            self._heat.put(index, [course.temperature for course in courses]),
            self._scale.put(index, [course.guidance for course in courses]),
            self._hide.put(index, [() if course.hide is None else course.hide for course in courses]),
            self._fresh.put(index, [() if course.fresh is None else course.fresh for course in courses]),
        ]
        if any(course.fresh is not None for course in courses) and self._added is None:
            codes = int(self.network.config.codebook_size)
            self._added = torch.zeros(len(self.ids), length, codes, device=self.ids.device)
            moved.append(True)
        if (priority := _priority(self.draws.order, tuple(ids.shape[1:]), confidence[:, 0])) is not None:
            self._priority[index] = priority.to(self._priority)
        if self._graphs is not None and any(moved):
            self._graphs.forget()

    @torch.no_grad()
    def step(self) -> None:
        """Every row that has a step left goes one on."""
        kind = self._kind()
        (self._run if self._graphs is None else self._graphs)(kind)
        for row in range(len(self._at)):
            self._at[row] += not self.ended(row)

    def _kind(self) -> _Kind:
        """What the next step does."""
        going = [(row, self._courses[row], step) for row, step in enumerate(self._at) if not self.ended(row)]
        most = 0
        if self.draws.masked_only and not self._feeds:  # what is fed back is of all ids
            length = self._priority.shape[1]
            eighth = -(-length // EIGHTHS)
            most = min(
                length, eighth * -(-max((self._unknown[row][step] for row, _, step in going), default=1) // eighth)
            )
        return _Kind(
            any(course.hide is not None for _, course, _ in going),
            any(course.guidance[step] != 1 for _, course, step in going),
            any(course.anew(step) for _, course, step in going),
            most,
        )

    def _run(self, kind: Any) -> None:
        """The step on the device, in place."""
        for first in range(0, len(self.ids), self.at_once):
            if self._graphs is not None or not all(map(self.ended, range(first, first + self.at_once))):
                self._pass(first, kind)
        self._steps += 1

    def _pass(self, first: int, kind: _Kind) -> None:
        """The step of `at_once` rows."""

        def stepped(part: slice) -> Tensor:
            return self._stepped(slice(first + part.start, first + part.stop), kind)

        self.ids[first : first + self.at_once] = self._parts.run(self.at_once, stepped)
        self._fed.turn(2 * first, 2 * self.at_once)

    def _changing(self) -> list[Tensor]:
        means = None if self.means is None else self.means.values
        return [self.ids, self._steps, self._finite, *(kept for kept in (self._added, means) if kept is not None)]

    def _stepped(self, part: slice, kind: _Kind) -> Tensor:
        """The ids (b, h, w) of some rows after the step. Doing it twice does no harm."""
        mask_id, grid = int(self.network.config.mask_id), self.ids.shape[1:]
        known = self.ids[part].flatten(1)
        if kind.hides:
            known = torch.where(self._hide.now(self._steps, part), mask_id, known)
        at = None if not kind.most else (known != mask_id).byte().argsort(dim=1, stable=True)[:, : kind.most]
        logits = self._predict(part, known.view(-1, *grid), at, kind)
        if self._half:
            self._finite[part] &= logits.isfinite().flatten(1).all(1)
        ordered = self.draws.order not in ("confidence", "critic")
        revealed = reveal(
            logits,
            known,
            self._choice.now(self._steps, part),
            self._confidence.now(self._steps, part),
            self._remaining.now(self._steps, part),
            self._heat.now(self._steps, part),
            mask_id=mask_id,
            top_p=self.draws.top_p,
            top_k=self.draws.top_k,
            priority=self._priority[part] if ordered else None,
            critic=None if self.critic is None else lambda drawn: self._judge(part, drawn.view(-1, *grid)),
            at=at,
        )
        if self.means is not None:
            self.means.keep(part, logits, at, (known == mask_id) & (revealed != mask_id))
        return revealed.view(-1, *grid)

    def _predict(self, part: slice, ids: Tensor, at: Tensor | None, kind: _Kind) -> Tensor:
        """Logits (b, L, C) for the ids (b, h, w) of some rows; (b, M, C), of the ids `at` (b, M) alone."""
        start = part.start + part.start // self.at_once * self.at_once
        if not kind.anew:
            conditional = self._logits(part, ids, start, at)
            return conditional if not kind.guided else self._with_kept(part, conditional, at)
        if self._parts.count == 1 and ids.numel() <= DOUBLED_CELLS:
            twice = None if at is None else torch.cat([at, at])
            both = self._logits(part, torch.cat([ids, ids]), start, twice)
            conditional, free = both.chunk(2)
        else:
            conditional, free = (self._logits(part, ids, first, at) for first in (start, start + self.at_once))
        if self._added is not None:
            return self._with_kept(part, conditional, at, free)
        scale = self._scale.now(self._steps, part)[:, None, None]
        return torch.where(scale == 1, conditional, guide(conditional, free, scale))

    def _with_kept(self, part: slice, conditional: Tensor, at: Tensor | None, free: Tensor | None = None) -> Tensor:
        """Guided logits, by what guidance adds at this step where it is fresh, else by what it added when it was."""
        assert self._added is not None, "a course that keeps it has made room"
        kept, scale = self._added[part], self._scale.now(self._steps, part)[:, None, None]
        where = None if at is None else at[:, :, None].expand(-1, -1, kept.shape[-1])
        added = kept if where is None else kept.gather(1, where)
        guided = conditional + (scale - 1) * added
        if free is not None:
            fresh = self._fresh.now(self._steps, part)[:, None, None]
            added = torch.where(fresh, conditional - free, added)
            kept.copy_(added) if where is None else kept.scatter_(1, where, added)
            guided = torch.where(fresh, guide(conditional, free, scale), guided)  # as where no row keeps anything
        return torch.where(scale == 1, conditional, guided)

    def _logits(self, part: slice, ids: Tensor, first: int, at: Tensor | None) -> Tensor:
        """Of the ids of a part, once or twice, under so many conditions from the first on."""
        condition = self._conditions.part(first, len(ids))
        if self._feeds:
            features = self.network.features(ids, condition, None, self._fed.before(first, len(ids)))
            self._fed.keep(features, first, self._is_kept(part, first, len(ids)))
        else:
            features = self.network.features(ids, condition, at)
        logits = self.network.head(features)
        self._half = logits.dtype == torch.float16
        return logits.flatten(1, 2).float()

    def _is_kept(self, part: slice, first: int, count: int) -> Tensor:
        """Bool (count,): of which rows a step's features are the next step's; without the prompt of those alone that
        ask anew, so that a row's picture does not depend on whether its neighbours do.
        """
        rows = part.stop - part.start
        anew = (self._scale.now(self._steps, part) != 1) & self._fresh.now(self._steps, part)
        if count > rows:
            return torch.cat([torch.ones_like(anew), anew])
        return anew if first - part.start - part.start // self.at_once * self.at_once else torch.ones_like(anew)

    def _judge(self, part: slice, ids: Tensor) -> Tensor:
        assert self.critic is not None
        condition = self._judged.part(part.start, len(ids))
        return self.critic.head(self.critic.features(ids, condition)).flatten(1)


def rows_at_once(count: int, length: int, device: torch.device) -> int:
    """Rows of `length` ids each that a pass is best made of, of `count`: all on a GPU; on a core as many as it caches.

    Passes of few rows also cost less where not all rows hold a picture.
    """
    if device.type != "cpu":
        return count
    most = max(1, CORE_CELLS // length)
    return next(rows for rows in range(min(most, count), 0, -1) if count % rows == 0)


def _noise(seeds: Sequence[int], stream: int, steps: int, length: int) -> Tensor:
    """Uniforms (N, S, L), each picture's from its own seed alone."""
    return torch.from_numpy(np.stack([uniforms(seed, stream, range(steps), length) for seed in seeds]))


def _priority(order: str, grid: tuple[int, ...], uniform: Tensor) -> Tensor | None:
    """(N, L) from uniforms (N, L): the highest are revealed first; None: by confidence, or a critic.

    A Halton sequence starts where the seed says.
    """
    if order in ("confidence", "critic"):
        return None
    if order == "random":
        return uniform
    ranks = torch.from_numpy(halton_ranks(*grid)).to(uniform.device)
    turned = (ranks + (uniform[:, :1] * len(ranks)).long()) % len(ranks)
    return -turned.to(uniform.dtype)
