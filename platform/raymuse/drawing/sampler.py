"""The sampling step: masked ids to known ones, every row on a course and at a step of its own.

A picture is a function of (weights, prompt, parameters, seed): its noise is drawn up front from its own generator, so
that neither its place in a batch nor the batch itself changes it. B rows, L ids of one, S steps, C codes, N pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymuse.config.sampling import SamplingConfig
from raymuse.masking import (
    CHOICE,
    CONFIDENCE,
    guidance_scales,
    guide,
    halton_ranks,
    masked_counts,
    reveal,
    temperatures,
    uniforms,
)

DOUBLED_CELLS = 4096  # ids up to which a guided step is one pass over twice the rows: beyond, two passes are as quick


class TokenTransformer(Protocol):
    """What the sampling loop needs of a base or super-resolution transformer."""

    config: Any

    def precompute(self, condition: Any) -> Any: ...

    def features(self, ids: Tensor, condition: Any, before: Tensor | None = None) -> Tensor: ...

    def head(self, features: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Course:
    """What happens to one picture at each of its steps.

    Attributes:
        remaining: ids that stay masked after the step.
        temperature: of the confidence's noise.
        guidance: scale; 1: none.
        hide: ids that are masked again before the step, bool (S, L); None: none.
    """

    remaining: Sequence[int]
    temperature: Sequence[float]
    guidance: Sequence[float]
    hide: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, sampling: SamplingConfig, length: int, masked: int | None = None, first: int = 0) -> "Course":
        """The steps from `first` on (counted from 0) of a sampling that began with `masked` (all) of `length` ids."""
        ratio = 1.0 if masked is None else masked / length
        scales = guidance_scales(sampling.guidance, sampling.steps, sampling.guidance_schedule, sampling.guidance_span)
        return cls(
            masked_counts(length, sampling.steps, sampling.masking, ratio)[first:],
            temperatures(sampling.temperature, sampling.steps, sampling.end_temperature)[first:],
            scales[first:],
        )

    @property
    def guided(self) -> bool:
        return any(scale != 1 for scale in self.guidance)


@dataclass(frozen=True)
class Draws:
    """How codes are drawn and ids ordered: what all rows of a batch share."""

    top_p: float = 1.0
    top_k: int = 0
    order: str = "confidence"

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Draws":
        return cls(sampling.top_p, sampling.top_k, sampling.order)


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
    streams: tuple[int, int] = (CHOICE, CONFIDENCE),
) -> Tensor:
    """Draw the unknown ids of B pictures, from the first step of all to the last (MaskGIT, section 3.2).

    Args:
        conditional: the network's condition for the prompts.
        unconditional: the same for the negative prompts; None where no course has guidance.
        ids: (B, h, w), the mask id where unknown; known ids come back untouched, but for those that a course hides.
        seeds: one a picture; all its noise follows from it.
        courses: one a picture; a shorter one ends earlier.
        streams: which of the seed's streams pick codes and order them.

    Returns:
        ids (B, h, w), all known.
    """
    rows = Rows(network, ids.shape, draws, streams, device=ids.device)
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
        draws, streams: see `sample_ids`.
        critic: where `draws.order` is "critic": a network with one logit an id.

    Attributes:
        ids: (B, h, w), the mask id where still unknown.
    """

    def __init__(
        self,
        network: TokenTransformer,
        shape: Sequence[int],
        draws: Draws | None = None,
        streams: tuple[int, int] = (CHOICE, CONFIDENCE),
        critic: TokenTransformer | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network, self.critic, self.draws, self.streams = network, critic, draws or Draws(), streams
        assert (self.draws.order == "critic") == (critic is not None)
        count, length = shape[0], math.prod(shape[1:])
        self.ids = torch.zeros(tuple(shape), dtype=torch.int64, device=device)
        self._courses, self._at = [Course([], [], [])] * count, [0] * count
        self._steps = torch.zeros(count, dtype=torch.int64, device=device)  # as _at
        self._doubles = count * length <= DOUBLED_CELLS
        self._conditions = _Conditions(2 * count)  # of the prompts, then of the negative ones
        self._judged = _Conditions(count)
        self._choice = _Table(count, (length,), torch.float64, 0.5, device)
        self._confidence = _Table(count, (length,), torch.float64, 0.5, device)
        self._remaining = _Table(count, (), torch.int64, 0, device)
        self._heat = _Table(count, (), torch.float64, 0.0, device)
        self._scale = _Table(count, (), torch.float32, 1.0, device)
        self._hide = _Table(count, (length,), torch.bool, False, device)
        self._priority = torch.zeros(count, length, dtype=torch.float64, device=device)
        self._feeds = bool(getattr(network.config, "self_conditioning", False))
        self._before: Tensor | None = None  # (2B, h, w, D), a self-conditioned network's features of the step before

    def ended(self, row: int) -> bool:
        """Whether a row's picture has no step left."""
        return self._at[row] >= len(self._courses[row].remaining)

    def clear(self, row: int) -> None:
        """Forget a row's picture: its steps cost its neighbours nothing any more."""
        self._courses[row], self._at[row] = Course([], [], []), 0

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
        self._conditions.put(index, self.network.precompute(conditional))
        if unconditional is not None:
            self._conditions.put(index + len(self.ids), self.network.precompute(unconditional))
        if self.critic is not None:
            self._judged.put(index, self.critic.precompute(judged))
        if self._before is not None:
            self._before[index] = self._before[index + len(self.ids)] = 0
        self.ids[index] = ids
        self._steps[index] = 0
        for row, course in zip(rows, courses, strict=True):
            self._courses[row], self._at[row] = course, 0

        length, steps = self._priority.shape[1], max(1, *(len(course.remaining) for course in courses))
        choice, confidence = (_noise(seeds, stream, steps, length) for stream in self.streams)
        self._choice.put(index, choice)
        self._confidence.put(index, confidence)
        self._remaining.put(index, [course.remaining for course in courses])
        self._heat.put(index, [course.temperature for course in courses])
        self._scale.put(index, [course.guidance for course in courses])
        self._hide.put(index, [() if course.hide is None else course.hide for course in courses])
        if (priority := _priority(self.draws.order, tuple(ids.shape[1:]), confidence[:, 0])) is not None:
            self._priority[index] = priority.to(self._priority)

    @torch.no_grad()
    def step(self) -> None:
        """Every row that has a step left goes one on."""
        shape, mask_id = self.ids.shape, int(self.network.config.mask_id)
        known, hides, guided = self.ids.flatten(1), False, False
        for row, course in enumerate(self._courses):
            if not self.ended(row):
                hides |= course.hide is not None
                guided |= course.guidance[self._at[row]] != 1
                self._at[row] += 1
        if hides:
            known = torch.where(self._hide.now(self._steps), mask_id, known)
        ordered = self.draws.order not in ("confidence", "critic")
        self.ids = reveal(
            self._predict(known.view(shape), guided).flatten(1, 2),
            known,
            self._choice.now(self._steps),
            self._confidence.now(self._steps),
            self._remaining.now(self._steps),
            self._heat.now(self._steps),
            mask_id=mask_id,
            top_p=self.draws.top_p,
            top_k=self.draws.top_k,
            priority=self._priority if ordered else None,
            critic=None if self.critic is None else lambda drawn: self._judge(drawn.view(shape)).flatten(1),
        ).view(shape)
        self._steps += 1

    def _predict(self, ids: Tensor, guided: bool) -> Tensor:
        """Logits (B, h, w, C) for ids (B, h, w); `guided` where a row has guidance at this step."""
        batch = len(ids)
        if not guided:
            return self._logits(ids, 0)
        if self._doubles:
            conditional, free = self._logits(torch.cat([ids, ids]), 0).chunk(2)
        else:
            conditional, free = (self._logits(ids, first) for first in (0, batch))
        scale = self._scale.now(self._steps).view(-1, *[1] * (conditional.ndim - 1))
        return torch.where(scale == 1, conditional, guide(conditional, free, scale.to(conditional.dtype)))

    def _logits(self, ids: Tensor, first: int) -> Tensor:
        """Of the network, under so many conditions from the first on."""
        condition, before = self._conditions.part(first, len(ids)), self._before
        if not self._feeds:
            return self.network.head(self.network.features(ids, condition))
        features = self.network.features(ids, condition, None if before is None else before[first : first + len(ids)])
        self._feed_back(features, first)
        return self.network.head(features)

    def _feed_back(self, features: Tensor, first: int) -> None:
        """Keep what a row's next step reads: without the prompt only of rows that are guided, whatever others are."""
        batch = len(self.ids)
        if self._before is None:
            self._before = features.new_zeros(2 * batch, *features.shape[1:])
        if first == 0:
            self._before[:batch] = features[:batch]
        if first + len(features) > batch:
            unguided = (self._scale.now(self._steps) == 1).view(-1, 1, 1, 1)
            self._before[batch:] = torch.where(unguided, self._before[batch:], features[-batch:])

    def _judge(self, ids: Tensor) -> Tensor:
        assert self.critic is not None
        return self.critic.head(self.critic.features(ids, self._judged.part(0, len(ids)))).squeeze(-1)


class _Conditions:
    """The prepared conditions of so many samples, replaced one by one; 0 before."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.whole: Any = None
        self.parts: dict[tuple[int, int], Any] = {}

    def put(self, index: Tensor, condition: Any) -> None:
        """Replace the samples `index` by the first ones of `condition`."""
        if self.whole is None:
            self.whole = _each(lambda new: new.new_zeros(self.count, *new.shape[1:]), condition)
        _each(lambda kept, new: kept.index_copy_(0, index, new[: len(index)]), self.whole, condition)

    def part(self, first: int, count: int) -> Any:
        """So many samples, as a view."""
        if (first, count) not in self.parts:
            self.parts[first, count] = _each(lambda tensor: tensor[first : first + count], self.whole)
        return self.parts[first, count]


class _Table:
    """What holds for each of B rows at each of its steps, (S, B, ...), and `after` beyond a row's end."""

    def __init__(
        self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, after: float, device: torch.device | str
    ) -> None:
        self.after = after
        self.values = torch.full((1, rows, *shape), after, dtype=dtype, device=device)

    def put(self, index: Tensor, rows: Sequence[Any] | Tensor) -> None:
        """Replace the rows `index` by `rows`, of (steps, ...) each."""
        steps = max(map(len, rows))
        if (missing := steps + 1 - len(self.values)) > 0:
            self.values = torch.cat([self.values, self._empty(missing, self.values.shape[1])])
        new = self._empty(len(self.values), len(rows)).cpu()
        for number, row in enumerate(rows):
            if len(row):
                new[: len(row), number] = torch.as_tensor(row).to(new)
        self.values[:, index] = new.to(self.values)

    def now(self, steps: Tensor) -> Tensor:
        """(B, ...): what holds for each row at the step (B,) it is at."""
        last = steps.clamp(max=len(self.values) - 1)
        return self.values[last, torch.arange(len(last), device=last.device)]

    def _empty(self, steps: int, rows: int) -> Tensor:
        return self.values.new_full((steps, rows, *self.values.shape[2:]), self.after)


def _each(function: Callable[..., Tensor], *conditions: Any) -> Any:
    """The condition whose tensors are those of the given ones, one by one, under the function: nested tuples."""
    if isinstance(conditions[0], Tensor):
        return function(*conditions)
    parts = [_each(function, *parts) for parts in zip(*conditions, strict=True)]
    kind = type(conditions[0])
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)


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
