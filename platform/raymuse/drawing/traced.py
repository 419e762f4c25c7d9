"""A transformer whose operations are recorded once and then called without Python: the same kernels, the same ids.

A small model at batch 1 spends a quarter of its time between its kernels. `torch.compile` saves that too, and fuses,
but takes minutes of a C++ compiler for it; recording takes a second and no compiler.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


def trace(network: N) -> N:
    """A copy whose `features` are recorded at the first call of every shape; it shares the weights.

    What is recorded knows nothing of weights that are replaced later, only of those that change in place.
    """
    weights = list(network.parameters())
    traced = copy.deepcopy(network, {id(weight): weight for weight in weights})
    traced.features = _Recorded(network)  # type: ignore[assignment]
    return traced


def is_traced(network: nn.Module) -> bool:
    return isinstance(getattr(network, "features", None), _Recorded)


class _Recorded:
    """A network's `features`, a recording for every shape of what it is given."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.recordings: dict[tuple[Any, ...], Any] = {}

    def __call__(self, ids: Tensor, condition: Any, at: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        given = (condition, at, before)
        tensors = list(_tensors(given))
        shape = tuple(ids.shape), None if at is None else tuple(at.shape), before is not None
        if shape not in self.recordings:
            self.recordings[shape] = self._record(ids, given, tensors)
        out: Tensor = self.recordings[shape](ids, *tensors)
        return out

    def _record(self, ids: Tensor, given: tuple[Any, ...], tensors: list[Tensor]) -> Any:
        def features(ids: Tensor, *tensors: Tensor) -> Tensor:
            out: Tensor = self.network.features(ids, *_filled(given, iter(tensors)))
            return out

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that shapes are taken as they are, which is why there is one for each
            return torch.jit.trace(features, (ids, *tensors), check_trace=False)  # type: ignore[no-untyped-call]


def _tensors(condition: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples, in order."""
    if isinstance(condition, Tensor):
        yield condition
    elif condition is not None:
        for part in condition:
            yield from _tensors(part)


def _filled(condition: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nested tuples with other tensors."""
    if isinstance(condition, Tensor):
        return next(tensors)
    if condition is None:
        return None
    parts = [_filled(part, tensors) for part in condition]
    kind = type(condition)
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
