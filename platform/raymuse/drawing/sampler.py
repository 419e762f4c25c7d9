"""The sampling loop: masked ids to known ones, step by step, every row on a course of its own.

A picture is a function of (weights, prompt, parameters, seed): its noise is drawn up front from its own generator, so
that neither its place in a batch nor the batch itself changes it. B pictures, L ids of one, S steps, C codes.
"""

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

Judge = Callable[[Tensor], Tensor]
OnStep = Callable[[int, NDArray[np.int64]], None]
"""Called after every step with its number and the ids (B, h, w), the mask id where one is still unknown."""

DOUBLED_CELLS = 4096  # ids up to which a guided step is one pass over twice the rows: beyond, two passes are as quick


class TokenTransformer(Protocol):
    """What the sampling loop needs of a base or super-resolution transformer."""

    config: Any

    def precompute(self, condition: Any) -> Any: ...

    def features(self, ids: Tensor, condition: Any) -> Tensor: ...

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
    on_step: OnStep | None = None,
    critic: Judge | None = None,
) -> Tensor:
    """Draw the unknown ids of B pictures (MaskGIT, section 3.2).

    Args:
        conditional: the network's condition for the prompts.
        unconditional: the same for the negative prompts; None where no course has guidance.
        ids: (B, h, w), the mask id where unknown; known ids come back untouched, but for those that a course hides.
        seeds: one a picture; all its noise follows from it.
        courses: one a picture; a shorter one ends earlier.
        streams: which of the seed's streams pick codes and order them.
        on_step: told how it gets on.
        critic: where `draws.order` is "critic": how real each of the ids (B, h, w) looks, a logit (B, h, w).

    Returns:
        ids (B, h, w), all known.
    """
    draws = draws or Draws()
    assert (draws.order == "critic") == (critic is not None)
    grid, mask_id, device = tuple(ids.shape[1:]), int(network.config.mask_id), ids.device
    batch, length = len(seeds), grid[0] * grid[1]
    if not (steps := max(len(course.remaining) for course in courses)):
        return ids
    choice, confidence = (_noise(seeds, stream, steps, length).to(device) for stream in streams)
    remaining = _table([course.remaining for course in courses], steps, 0, torch.int64).to(device)
    heat = _table([course.temperature for course in courses], steps, 0.0, torch.float64).to(device)
    scale = _table([course.guidance for course in courses], steps, 1.0, torch.float32)
    guided, scale = (scale != 1).any(dim=1).tolist(), scale.to(device)
    hide = _hidden(courses, steps, length, device)
    predict = _Prediction(network, conditional, unconditional if any(guided) else None, batch * length)
    priority = _priority(draws.order, grid, confidence[0])
    known = ids.reshape(batch, length)
    for step in range(steps):
        if hide is not None:
            known = torch.where(hide[step], mask_id, known)
        known = reveal(
            predict(known.view(batch, *grid), scale[step] if guided[step] else None).view(batch, length, -1),
            known,
            choice[step],
            confidence[step],
            remaining[step],
            heat[step],
            mask_id=mask_id,
            top_p=draws.top_p,
            top_k=draws.top_k,
            priority=priority,
            critic=None if critic is None else lambda drawn: critic(drawn.view(batch, *grid)).view(batch, length),
        )
        if on_step is not None:
            on_step(step, known.view(batch, *grid).cpu().numpy())
    return known.view(batch, *grid)


class _Prediction:
    """Logits of one step, guided or not. What is constant over the steps is computed here, once."""

    def __init__(self, network: TokenTransformer, conditional: Any, unconditional: Any | None, cells: int) -> None:
        self.network = network
        self.doubled = unconditional is not None and cells <= DOUBLED_CELLS
        self.conditional = network.precompute(conditional)
        self.unconditional = None if unconditional is None else network.precompute(unconditional)
        self.both = _join(self.conditional, self.unconditional) if self.doubled else None

    def __call__(self, ids: Tensor, scale: Tensor | None) -> Tensor:
        """Logits (B, h, w, C) for ids (B, h, w); scale (B,), None where no row has guidance."""
        if scale is None or self.unconditional is None:
            return self._logits(ids, self.conditional)
        if self.doubled:
            conditional, free = self._logits(torch.cat([ids, ids]), self.both).chunk(2)
        else:
            conditional, free = self._logits(ids, self.conditional), self._logits(ids, self.unconditional)
        scale = scale.view(-1, *[1] * (conditional.ndim - 1))
        return torch.where(scale == 1, conditional, guide(conditional, free, scale.to(conditional.dtype)))

    def _logits(self, ids: Tensor, condition: Any) -> Tensor:
        return self.network.head(self.network.features(ids, condition))


def _join(one: Any, other: Any) -> Any:
    """Two conditions, nested tuples of tensors, one after the other along the batch."""
    if isinstance(one, Tensor):
        return torch.cat([one, other])
    parts = [_join(*pair) for pair in zip(one, other, strict=True)]
    return type(one)(*parts) if hasattr(one, "_fields") else tuple(parts)


def _noise(seeds: Sequence[int], stream: int, steps: int, length: int) -> Tensor:
    """Uniforms (S, B, L), each picture's from its own seed alone."""
    draws = np.stack([uniforms(seed, stream, range(steps), length) for seed in seeds], axis=1)
    return torch.from_numpy(draws)


def _table(rows: Sequence[Sequence[float]], steps: int, after: float, dtype: torch.dtype) -> Tensor:
    """(S, B): what holds at each step, and `after` a row's end."""
    return torch.tensor([[*row, *[after] * (steps - len(row))] for row in rows], dtype=dtype).T


def _hidden(courses: Sequence[Course], steps: int, length: int, device: torch.device) -> Tensor | None:
    if all(course.hide is None for course in courses):
        return None
    table = np.zeros((steps, len(courses), length), dtype=bool)
    for row, course in enumerate(courses):
        if course.hide is not None:
            table[: len(course.hide), row] = course.hide
    return torch.from_numpy(table).to(device)


def _priority(order: str, grid: tuple[int, ...], uniform: Tensor) -> Tensor | None:
    """(B, L): the highest are revealed first; None: by confidence, or a critic.

    A Halton sequence starts where the seed says.
    """
    if order in ("confidence", "critic"):
        return None
    if order == "random":
        return uniform
    ranks = torch.from_numpy(halton_ranks(*grid)).to(uniform.device)
    turned = (ranks + (uniform[:, :1] * len(ranks)).long()) % len(ranks)
    return -turned.to(uniform.dtype)
