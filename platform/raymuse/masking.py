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
    "power": lambda r: 1 - r**3,
    "sigmoid": lambda r: (_sigmoid(3) - _sigmoid(6 * r - 3)) / (_sigmoid(3) - _sigmoid(-3)),  # arXiv 2301.10972
}

# How much of the guidance applies at a step, as a function of the progress (i + 1) / N in (0, 1].
GUIDANCE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda r: 1.0,
    "linear": lambda r: r,  # Muse, section 2.7
    "cosine": lambda r: (1 - math.cos(r * math.pi)) / 2,
}

# Streams keep draws for different purposes apart under one seed.
MASK, DROPOUT, LOW_NOISE, CAPTION, ORDER, CHOICE, CONFIDENCE, HIGH_CHOICE, HIGH_CONFIDENCE, SEED, START = range(11)
RECTANGLE, CRITIC, FED_BACK, NETWORK = 11, 12, 13, 14

_KEY = 0x7261796D757365
_LOW = np.uint64(0xFFFFFFFF)
_PHILOX = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_PHILOX_LOW, _PHILOX_HIGH = _PHILOX & _LOW, _PHILOX >> 32
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def uniforms(seed: int, stream: int, positions: Sequence[int] | NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for every position, shape (B, count); row i depends on positions[i] alone.

    Counter-based (Philox 4x64): position and stream are the counter's high words, the seed is the key.
    """
    if count == 1 and len(positions) >= 128:  # a generator that is set anew for each costs two and a half times that
        return _first_uniforms(seed, stream, np.asarray(positions, dtype=np.uint64))
    rows = np.empty((len(positions), count))
    bits = np.random.Philox(counter=0, key=np.array([seed, _KEY], dtype=np.uint64))
    draw = np.random.Generator(bits)
    state = bits.state  # set anew for every row: a fifth of the time that another generator takes
    counter = state["state"]["counter"]
    counter[3] = stream
    for row, position in zip(rows, positions, strict=True):
        counter[2] = int(position)
        bits.state = state
        draw.random(out=row)
    return rows


def _first_uniforms(seed: int, stream: int, positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The first number of every position (B, 1), of all at once (Philox 4x64-10: Salmon et al., SC 2011, section 3.3).

    The four words of a counter are the rows of two arrays (2, B).
    """
    even, odd = np.stack([np.ones_like(positions), positions]), np.zeros((2, len(positions)), dtype=np.uint64)
    odd[1] = stream
    key = np.array([[seed], [_KEY]], dtype=np.uint64)
    for _ in range(10):
        crossed, low = (even >> 32) * _PHILOX_LOW, even & _LOW
        middle = (low * _PHILOX_LOW >> 32) + (crossed & _LOW) + low * _PHILOX_HIGH
        high = (even >> 32) * _PHILOX_HIGH + (crossed >> 32) + (middle >> 32)
        even, odd = high[::-1] ^ odd ^ key, (even * _PHILOX)[::-1]
        key = key + _WEYL
    first: NDArray[np.float64] = (even[0] >> 11) * 2.0**-53
    return first[:, None]


@dataclass(frozen=True)
class Hidden:
    """Ids (B, L) with some replaced by the mask id, and where (bool, B, L)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Rectangles:
    """Of some samples the masked ids are a rectangle, as in- and outpainting ask for (open-muse's pre-training).

    Args:
        share: of the samples.
        grid: (h, w) that the L ids are.
    """

    share: float
    grid: tuple[int, int]

    def masks(self, counts: NDArray[np.int64], seed: int, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Rectangles (B, L) of about `counts` cells, h / w between 1/2 and 2 where the grid allows; elsewhere none."""
        height, width = self.grid
        masks = np.zeros((len(counts), height, width), dtype=np.bool_)
        for mask, count, (chosen, aspect, top, left) in zip(
            masks, counts, uniforms(seed, RECTANGLE, positions, 4), strict=True
        ):
            if chosen >= self.share:
                continue
            wished = round(math.sqrt(count * 4 ** (aspect - 0.5)))
            rows = min(max(wished, -(-int(count) // width), 1), height)
            columns = min(max(round(count / rows), 1), width)
            first, second = int(top * (height - rows + 1)), int(left * (width - columns + 1))
            mask[first : first + rows, second : second + columns] = True
        return masks.reshape(len(counts), -1)


def hide(
    ids: Tensor,
    positions: NDArray[np.int64],
    *,
    seed: int,
    mask_id: int,
    schedule: str = "cosine",
    min_ratio: float = 0.0,
    rectangles: Rectangles | None = None,
    ratio: float | None = None,
) -> Hidden:
    """Mask `max(1, round(L schedule(u)))` random ids of every sample, u ~ U(0, 1) (MaskGIT, section 3.1).

    Args:
        ids: token ids (B, L).
        positions: global position of each sample in the training data (B,); the mask is keyed by it.
        min_ratio: masks at least this share of the ids.
        rectangles: which samples mask a rectangle of about as many ids instead.
        ratio: of every sample, in place of the schedule's draw.
    """
    length = ids.shape[1]
    draws = uniforms(seed, MASK, positions, 1 + length)
    drawn = (SCHEDULES[schedule](u) for u in draws[:, 0])
    ratios = np.array([max(share, min_ratio) if ratio is None else ratio for share in drawn])
    counts = np.maximum(1, np.round(ratios * length)).astype(np.int64)
    places = draws[:, 1:]
    last = np.take_along_axis(np.sort(places, axis=1), counts[:, None] - 1, axis=1)
    scattered = places <= last
    if rectangles is not None:
        whole = rectangles.masks(counts, seed, positions)
        scattered = np.where(whole.any(axis=1, keepdims=True), whole, scattered)
    mask = torch.from_numpy(scattered).to(ids.device)
    return Hidden(torch.where(mask, mask_id, ids), mask)


def mean_masking_ratio(schedule: str, min_ratio: float = 0.0) -> float:
    """Of the draws of `hide`."""
    draws = (np.arange(1000) + 0.5) / 1000
    return float(np.mean([max(SCHEDULES[schedule](u), min_ratio) for u in draws]))


def masked_counts(length: int, steps: int, schedule: str = "cosine", start_ratio: float = 1.0) -> list[int]:
    """Ids that stay masked after each of `steps` steps; the last is 0 (as diffusers' AmusedScheduler)."""
    shape = SCHEDULES[schedule]
    counts = [math.floor(length * start_ratio * shape((step + 1) / steps)) for step in range(steps - 1)]
    return [max(1, count) for count in counts] + [0]


def temperatures(start: float, steps: int, end: float = 0.0) -> list[float]:
    """Confidence temperature of each step, going linearly from `start` to `end`."""
    return [float(value) for value in np.linspace(start, end, steps)]


def guidance_scales(
    scale: float, steps: int, schedule: str = "constant", span: tuple[float, float] = (0.0, 1.0)
) -> list[float]:
    """Guidance of each step: 1 + (scale - 1) f((i + 1) / N) where the progress i / N lies in [span), else 1 (none)."""
    shape, (first, last) = GUIDANCE_SCHEDULES[schedule], span
    return [
        1 + (scale - 1) * shape((step + 1) / steps) if first <= step / steps < last else 1.0 for step in range(steps)
    ]


def fresh_steps(scales: Sequence[float], every: int) -> list[bool]:
    """Which steps compute what guidance adds: of those with guidance the first, and every so many after it."""
    guided = [scale != 1 for scale in scales]
    return [here and sum(guided[:step]) % every == 0 for step, here in enumerate(guided)]


def halton_ranks(height: int, width: int) -> NDArray[np.int64]:
    """When each cell of a grid comes (height * width,) in the order that spreads best: a 2-D Halton sequence.

    Points with the radical inverses to the bases 2 and 3 as coordinates; a cell comes with its first point (Besnier et
    al., "Halton Scheduler for Masked Generative Image Transformer", arXiv 2503.17076, section 3.2).
    """
    ranks = np.full(height * width, -1, dtype=np.int64)
    found = point = 0
    while found < len(ranks):
        point += 1
        cell = int(_radical_inverse(point, 2) * height) * width + int(_radical_inverse(point, 3) * width)
        if ranks[cell] < 0:
            ranks[cell] = found
            found += 1
    return ranks


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the point, in [0, 1)."""
    value, place = 0.0, 1 / base
    while number:
        number, digit = divmod(number, base)
        value, place = value + digit * place, place / base
    return value


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits: uncond + scale (cond - uncond) (Ho & Salimans; Muse, section 2.7)."""
    return unconditional + scale * (conditional - unconditional)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest codes that together reach `top_p`, the others at 0; not scaled to a sum of 1.

    Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751, section 3.1).
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(dim=-1)[..., :-1], (1, 0))
    return torch.zeros_like(ordered).scatter_(-1, order, ordered.masked_fill(before >= top_p, 0))


def likeliest(probabilities: Tensor, top_k: int) -> Tensor:
    """The `top_k` likeliest codes, the others at 0."""
    kept, order = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept / kept.sum(dim=-1, keepdim=True))


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Codes (...) by inverse CDF from probabilities (..., C), which need not sum to 1, and uniforms (...)."""
    cdf = probabilities.cumsum(dim=-1)
    below_one = uniform.to(cdf.dtype).clamp(max=1 - 2**-24)  # at the very end of the CDF stand codes of probability 0
    target = (below_one * cdf[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cdf.contiguous(), target, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


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
    top_k: int = 0,
    priority: Tensor | None = None,
    critic: Callable[[Tensor], Tensor] | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """One sampling step: draw every masked id, then mask the least confident again.

    Args:
        logits: (B, L, C) over the codes; (B, M, C) with `at`.
        ids: (B, L), `mask_id` where unknown; known ids are never touched.
        choice: uniforms (B, L) that pick the codes by inverse CDF.
        confidence: uniforms (B, L) behind the Gumbel noise of the confidence.
        remaining: (B,) ids that stay masked; 0 keeps all.
        temperature: (B,) scale of the Gumbel noise.
        top_p: draw from each position's `nucleus`; 1: from all codes.
        top_k: draw from each position's `likeliest`; 0: from all codes; 1: the best, without chance.
        priority: (B, L) takes the place of the confidence: the highest are kept first.
        critic: tells of all ids, once drawn (B, L), how real each looks (B, L), a logit that takes the place of log p
            (Token-Critic, Lezama et al., arXiv 2209.04439, section 3.2).
        at: which ids the logits are of (B, M): all that are masked, each once, and any others.

    Returns:
        ids (B, L). Confidence is log p + temperature * Gumbel (MaskGIT, section 3.2), p of all codes' softmax.
    """
    unknown = ids == mask_id
    probabilities = logits.float().softmax(dim=-1)
    allowed = likeliest(probabilities, top_k) if top_k else probabilities
    here = choice if at is None else choice.gather(1, at)
    codes = pick(allowed if top_p == 1 else nucleus(allowed, top_p), here)
    drawn = torch.where(unknown, codes if at is None else ids.scatter(1, at, codes), ids)

    if priority is not None:
        score = priority
    else:
        if critic is not None:
            sure = critic(drawn).to(probabilities.dtype)
        else:
            sure = _log_of(probabilities, codes)
            sure = sure if at is None else torch.zeros_like(ids, dtype=sure.dtype).scatter_(1, at, sure)
        score = sure + temperature.to(sure.dtype)[:, None] * _gumbel(confidence.to(sure.dtype))
    score = score.masked_fill(~unknown, math.inf)
    left = torch.minimum(remaining, unknown.sum(dim=1) - 1).clamp(min=1) * (remaining > 0)
    ranks = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return torch.where((ranks < left[:, None]) & unknown, mask_id, drawn)


def _log_of(probabilities: Tensor, drawn: Tensor) -> Tensor:
    picked = probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return picked.clamp(min=torch.finfo(picked.dtype).tiny).log()


def _gumbel(uniform: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniform.clamp(torch.finfo(uniform.dtype).tiny, 1 - 1e-7)))
