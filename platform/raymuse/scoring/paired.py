"""Which of two is better, from pairs: the same prompt and seed, drawn by the one and by the other.

Intervals are percentiles of the bootstrap over prompts (Efron and Tibshirani, 1993, chapter 13): whole prompts are
drawn with replacement, since pictures of one prompt are not independent. The p-value is of the exact two-sided sign
test over the prompts, ties left out; for right and wrong it is McNemar's exact test.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
TIE = 1e-6  # CLIP scores of one picture, in two batches, differ by as much
AT_ONCE = 1 << 22  # draws of prompts held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """What pairs of values say, more being better.

    Attributes:
        pairs, prompts: how many.
        mean_a, mean_b: of all values.
        difference: mean of a - b.
        wins_a, wins_b, ties: pairs.
        share_a: of the pairs that a wins, a tie being half a win each.
        p_value: of the sign test; 1 where all are ties.
    """

    pairs: int
    prompts: int
    mean_a: float
    mean_b: float
    difference: Interval
    wins_a: int
    wins_b: int
    ties: int
    share_a: Interval
    p_value: float

    @property
    def better(self) -> str | None:
        """ "a" or "b" where the interval of the difference leaves out 0; None: nobody can tell."""
        if self.difference.low > 0:
            return "a"
        return "b" if self.difference.high < 0 else None


def half_width(values: Values) -> float:
    """Half of the 95 % interval (normal) of the mean of values (N,), of two at least."""
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def compare(a: Values, b: Values, prompts: Sequence[int], confidence: float, resamples: int) -> Paired:
    """Compare values (N,) in pairs.

    Args:
        prompts: which prompt each pair is of.
        confidence: of the intervals, e.g. 0.95.
        resamples: bootstrap samples, drawn with a fixed seed.
    """
    differences = np.where(np.abs(a - b) < TIE, 0.0, a - b)
    won = np.where(differences > 0, 1.0, np.where(differences < 0, 0.0, 0.5))
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)
    means = _resampled(np.stack([differences, won]), groups, resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, tail, axis=1), np.quantile(means, 1 - tail, axis=1)
    signs = np.sign(np.bincount(groups, differences))
    for_a, for_b = int((signs > 0).sum()), int((signs < 0).sum())
    return Paired(
        pairs=len(a),
        prompts=int(groups.max()) + 1,
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=Interval(float(differences.mean()), float(low[0]), float(high[0])),
        wins_a=int((differences > 0).sum()),
        wins_b=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
        share_a=Interval(float(won.mean()), float(low[1]), float(high[1])),
        p_value=float(stats.binomtest(for_a, for_a + for_b).pvalue) if for_a + for_b else 1.0,
    )


def _resampled(values: Values, groups: NDArray[np.intp], resamples: int) -> Values:
    """Means (K, R) of values (K, N) over R draws of as many groups as there are, with replacement."""
    sums = np.stack([np.bincount(groups, row) for row in values])
    counts = np.bincount(groups).astype(np.float64)
    rng = np.random.default_rng(0)
    found: list[Values] = []
    at_once = max(1, AT_ONCE // len(counts))
    for start in range(0, resamples, at_once):
        drawn = rng.integers(len(counts), size=(min(at_once, resamples - start), len(counts)))
        found.append(sums[:, drawn].sum(axis=2) / counts[drawn].sum(axis=1))
    return np.concatenate(found, axis=1)
