"""The Fréchet distance between two sets of features, from sums that can be added up part by part."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_FIELDS = ("count", "total", "products")


@dataclass(frozen=True)
class Moments:
    """Count, sum (D,) and sum of outer products (D, D) of feature vectors."""

    count: int
    total: Array
    products: Array

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Self:
        """Of features (N, D)."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(axis=0), exact.T @ exact)

    @classmethod
    def from_gaussian(cls, mean: Array, covariance: Array, count: int) -> Self:
        """Of `count` vectors with that mean (D,) and that covariance (D, D) of a sample."""
        return cls(count, mean * count, covariance * (count - 1) + count * np.outer(mean, mean))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Array:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """(D, D), of a sample: divided by N - 1."""
        return (self.products - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def pack(moments: Mapping[str, Moments]) -> bytes:
    """Moments by name, as one file's bytes; `unpack` reads them."""
    file = io.BytesIO()
    arrays = {f"{name}/{field}": getattr(sums, field) for name, sums in moments.items() for field in _FIELDS}
    np.savez(file, **arrays)
    return file.getvalue()


def unpack(data: bytes) -> dict[str, Moments]:
    """What `pack` wrote."""
    with np.load(io.BytesIO(data)) as arrays:
        names = dict.fromkeys(name.rpartition("/")[0] for name in arrays)
        found = {name: [arrays[f"{name}/{field}"] for field in _FIELDS] for name in names}
    return {name: Moments(int(count), total, products) for name, (count, total, products) in found.items()}


def frechet_distance(drawn: Moments, real: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 for equal sets (Heusel et al., arXiv 1706.08500, section 2).

    By torchmetrics' `FrechetInceptionDistance`, whose own states these sums are. With few pictures it is too large, by
    an amount that depends on their number: compare sets of one size.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    from raymuse.scoring.given import Given, quietly

    with quietly():
        metric = FrechetInceptionDistance(Given(len(real.total)))
        metric.orig_dtype = torch.float64  # which `update` would take from the features
        for side, sums in (("real", real), ("fake", drawn)):
            setattr(metric, f"{side}_features_sum", torch.from_numpy(sums.total))
            setattr(metric, f"{side}_features_cov_sum", torch.from_numpy(sums.products))
            setattr(metric, f"{side}_features_num_samples", torch.tensor(sums.count))
        return float(metric.compute())
