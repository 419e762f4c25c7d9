"""How good a set of pictures is, by its features: KID, precision and recall, the Inception score, codebook usage.

N drawn and M real pictures, D features each, K codes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raymuse.scoring.given import Given, quietly

Vectors = NDArray[np.float32]
ROWS_AT_ONCE = 2000  # of a table of distances: 2000 x 50,000 in fp32 is 400 MB
SPLITS = 10  # of the Inception score
SHUFFLE_SEED = 2020  # torch-fidelity's


@dataclass(frozen=True)
class Spread:
    """A mean over subsets, and the deviation between them."""

    mean: float
    deviation: float


def kernel_distance(drawn: Vectors, real: Vectors, subsets: int = 100, subset_size: int = 1000) -> Spread:
    """KID: the squared MMD of the kernel (x.y / D + 1)^3, unbiased, mean of subsets (arXiv 1801.01401, section 4).

    By torchmetrics' `KernelInceptionDistance`. Subsets that would be larger than a set are as large as the smaller one;
    where that is all of both, one says what all would. What is drawn is the same every time.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(drawn), len(real))
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SHUFFLE_SEED)
        count = 1 if size == len(drawn) == len(real) else subsets
        metric = KernelInceptionDistance(Given(drawn.shape[1]), subsets=count, subset_size=size)
        metric.update(torch.from_numpy(real).double(), real=True)
        metric.update(torch.from_numpy(drawn).double(), real=False)
        mean, deviation = metric.compute()
    return Spread(float(mean), float(deviation))


def precision_recall(drawn: Vectors, real: Vectors, neighbours: int = 3) -> tuple[float, float]:
    """Shares of drawn pictures within the real ones' manifold, and of real ones within the drawn ones'.

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest of the same set
    (Kynkäänniemi et al., arXiv 1904.06991, section 3; there with VGG16's features, in the field mostly Inception's).
    """
    ours, theirs = torch.from_numpy(drawn), torch.from_numpy(real)
    return _share_inside(ours, theirs, neighbours), _share_inside(theirs, ours, neighbours)


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, neighbours: int) -> float:
    nearest = min(neighbours, len(manifold) - 1) + 1  # itself is the first
    reach = torch.cat([torch.cdist(part, manifold).kthvalue(nearest, dim=1).values for part in _parts(manifold)])
    inside = torch.cat([(torch.cdist(part, manifold) <= reach).any(dim=1) for part in _parts(points)])
    return float(inside.double().mean())


def inception_score(logits: Vectors) -> Spread:
    """exp of the mean KL divergence of p(class | picture) from p(class), over ten splits (arXiv 1606.03498, section 4).

    The pictures are shuffled as torch-fidelity shuffles them. Fewer pictures than splits are a split each.
    """
    count = len(logits)
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    said = torch.from_numpy(logits[order]).double().log_softmax(dim=1)
    scores = []
    parts = min(SPLITS, count)
    for number in range(parts):
        part = said[number * count // parts : (number + 1) * count // parts]
        overall = part.exp().mean(dim=0, keepdim=True).log()
        scores.append(float((part.exp() * (part - overall)).sum(dim=1).mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))


@dataclass(frozen=True)
class Usage:
    """How pictures use a codebook.

    Attributes:
        share: of the codes that occur at all.
        perplexity: as many codes, equally frequent, would have the same entropy.
    """

    share: float
    perplexity: float


def codebook_usage(counts: NDArray[np.int64]) -> Usage:
    """From how often each code occurs (K,)."""
    likely = counts[counts > 0] / counts.sum()
    return Usage(float((counts > 0).mean()), float(np.exp(-(likely * np.log(likely)).sum())))


def _parts(points: torch.Tensor) -> list[torch.Tensor]:
    return [points[first : first + ROWS_AT_ONCE] for first in range(0, len(points), ROWS_AT_ONCE)]
