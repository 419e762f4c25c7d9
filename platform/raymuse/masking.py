"""The science of masked image modelling: schedules, hiding ids in training, revealing them in sampling.

Every random number is a function of (seed, stream, position), so that neither the batch, the worker nor a resume
can change it. Shapes: B samples, L ids of one picture (row-major), C codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Masking ratio as a function of progress in [0, 1]: from 1 (all masked) to 0 (none).
Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda r: math.cos(r * math.pi / 2),
    "linear": lambda r: 1 - r,
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
    "square": lambda r: 1 - r**2,
    "root": lambda r: 1 - math.sqrt(r),
}

# Streams keep draws for different purposes apart under one seed.
MASK, DROPOUT, LOW_NOISE, CAPTION, ORDER, CHOICE, CONFIDENCE, HIGH_CHOICE, HIGH_CONFIDENCE, SEED = range(10)


def uniforms(seed: int, stream: int, positions: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for every position, shape (B, count); row i depends on positions[i] alone.

    Counter-based (Philox 4x64): position and stream are the counter's high words, the seed is the key.
    """
    rows = np.empty((len(positions), count))
    for row, position in enumerate(positions):
        counter = np.array([0, 0, int(position), stream], dtype=np.uint64)
        key = np.array([seed, 0x7261796D757365], dtype=np.uint64)
        rows[row] = np.random.Generator(np.random.Philox(counter=counter, key=key)).random(count)
    return rows


@dataclass(frozen=True)
class Hidden:
    """Ids (B, L) with some replaced by the mask id, and where (bool, B, L)."""

    ids: Tensor
    mask: Tensor


def hide(
    ids: Tensor,
    positions: NDArray[np.int64],
    *,
    seed: int,
    mask_id: int,
    schedule: str = "cosine",
    min_ratio: float = 0.0,
) -> Hidden:
    """Mask `max(1, round(L schedule(u)))` random ids of every sample, u ~ U(0, 1) (MaskGIT, section 3.1).

    Args:
        ids: token ids (B, L).
        positions: global position of each sample in the training data (B,); the mask is keyed by it.
        min_ratio: masks at least this share of the ids.
    """
    length = ids.shape[1]
    draws = uniforms(seed, MASK, positions, 1 + length)
    ratios = np.array([max(SCHEDULES[schedule](u), min_ratio) for u in draws[:, 0]])
    counts = np.maximum(1, np.round(ratios * length)).astype(np.int64)
    ranks = draws[:, 1:].argsort(axis=1).argsort(axis=1)
    mask = torch.from_numpy(ranks < counts[:, None]).to(ids.device)
    return Hidden(torch.where(mask, mask_id, ids), mask)


def masked_counts(length: int, steps: int, schedule: str = "cosine", start_ratio: float = 1.0) -> list[int]:
    """Ids that stay masked after each of `steps` steps; the last is 0 (as diffusers' AmusedScheduler)."""
    shape = SCHEDULES[schedule]
    counts = [math.floor(length * start_ratio * shape((step + 1) / steps)) for step in range(steps - 1)]
    return [max(1, count) for count in counts] + [0]


def temperatures(start: float, steps: int) -> list[float]:
    """Confidence temperature of each step, falling linearly from `start` to 0."""
    return [float(value) for value in np.linspace(start, 0.0, steps)]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits: uncond + scale (cond - uncond) (Ho & Salimans; Muse, section 2.7)."""
    return unconditional + scale * (conditional - unconditional)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest codes that together reach `top_p`, the others at 0; not scaled to a sum of 1.

    Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751, section 3.1).
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0))
    return torch.zeros_like(ordered).scatter_(-1, order, ordered.masked_fill(before >= top_p, 0))


def reveal(
    logits: Tensor,
    ids: Tensor,
    choice: Tensor,
    confidence: Tensor,
    remaining: Tensor,
    temperature: Tensor,
    *,
    mask_id: int,
    top_p: float = 1.0,
) -> Tensor:
    """One sampling step: draw every masked id, then mask the least confident again.

    Args:
        logits: (B, L, C) over the codes.
        ids: (B, L), `mask_id` where unknown; known ids are never touched.
        choice: uniforms (B, L) that pick the codes by inverse CDF.
        confidence: uniforms (B, L) behind the Gumbel noise of the confidence.
        remaining: (B,) ids that stay masked; 0 keeps all.
        temperature: (B,) scale of the Gumbel noise.
        top_p: draw from each position's `nucleus`; 1: from all codes.

    Returns:
        ids (B, L). Confidence is log p + temperature * Gumbel (MaskGIT, section 3.2), p of all codes' softmax.
    """
    unknown = ids == mask_id
    probabilities = logits.float().softmax(dim=-1)
    cdf = (probabilities if top_p == 1 else nucleus(probabilities, top_p)).cumsum(dim=-1)
    below_one = choice.to(cdf.dtype).clamp(max=1 - 2**-24)  # at the very end of the CDF stand codes of probability 0
    target = (below_one * cdf[..., -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cdf.contiguous(), target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    drawn = torch.where(unknown, drawn, ids)

    picked = probabilities.gather(-1, drawn.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    tiny = torch.finfo(picked.dtype).tiny
    gumbel = -torch.log(-torch.log(confidence.to(picked.dtype).clamp(tiny, 1 - 1e-7)))
    score = picked.clamp(min=tiny).log() + temperature.to(picked.dtype)[:, None] * gumbel
    score = score.masked_fill(~unknown, math.inf)

    left = torch.minimum(remaining, unknown.sum(dim=1) - 1).clamp(min=1) * (remaining > 0)
    ranks = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return torch.where((ranks < left[:, None]) & unknown, mask_id, drawn)
