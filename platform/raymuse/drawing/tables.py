"""What a batch's rows hold while they are drawn, on the device, replaced row by row: conditions, and values by step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Conditions:
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


class Table:
    """What holds for each of B rows at each of its steps, (S, B, ...), and `after` beyond a row's end."""

    def __init__(
        self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, after: float, device: torch.device | str
    ) -> None:
        self.after = after
        self.values = torch.full((1, rows, *shape), after, dtype=dtype, device=device)

    def put(self, index: Tensor, rows: Sequence[Any] | Tensor) -> bool:
        """Replace the rows `index` by `rows`, of (steps, ...) each. Returns whether the values have moved."""
        steps = max(map(len, rows))
        if (missing := steps + 1 - len(self.values)) > 0:
            self.values = torch.cat([self.values, self._empty(missing, self.values.shape[1])])
        new = self._empty(len(self.values), len(rows)).cpu()
        for number, row in enumerate(rows):
            if len(row):
                new[: len(row), number] = torch.as_tensor(row).to(new)
        self.values[:, index] = new.to(self.values)
        return missing > 0

    def now(self, steps: Tensor, part: slice) -> Tensor:
        """(b, ...): what holds for each row of a part at the step, of (B,), that it is at."""
        values, last = self.values[:, part], steps[part].clamp(max=len(self.values) - 1)
        return values[last, torch.arange(len(last), device=last.device)]

    def _empty(self, steps: int, rows: int) -> Tensor:
        return self.values.new_full((steps, rows, *self.values.shape[2:]), self.after)


class Means:
    """What is decoded in the place of each id of B rows: of one that was drawn, the mean of all vectors by the
    probabilities that it was drawn from, before `top_p` and `top_k`; any other stands for itself.

    Args:
        vectors: what each id stands for, (C, V).

    Attributes:
        values: (B, L, V).
    """

    def __init__(self, vectors: Tensor, rows: int, length: int) -> None:
        self.vectors = vectors
        self.values = vectors.new_zeros(rows, length, vectors.shape[1])

    def begin(self, index: Tensor, ids: Tensor) -> None:
        """Other pictures begin in the rows `index`, with ids (N, L); the mask id is above all, and stands for any."""
        self.values[index] = self.vectors[ids.clamp(max=len(self.vectors) - 1)]

    def keep(self, part: slice, logits: Tensor, at: Tensor | None, drawn: Tensor) -> None:
        """Once a step has `drawn` ids (bool, (b, L)) from logits (b, L, C), or from those `at` (b, M) alone."""
        means, kept = logits.softmax(dim=-1) @ self.vectors, self.values[part]
        if at is not None:
            means = kept.scatter(1, at[:, :, None].expand_as(means), means)
        self.values[part] = torch.where(drawn[:, :, None], means, kept)


class FedBack:
    """Of a self-conditioned network: the features (S, h, w, D) that its next step reads, and those that this one does.

    The one becomes the other when a pass is done, so that a part of it may be done twice. 0 before the first step.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._now: Tensor | None = None
        self._next: Tensor | None = None

    def before(self, first: int, count: int) -> Tensor | None:
        """Of so many samples, those of the step before; None: no step has been."""
        return None if self._now is None else self._now[first : first + count]

    def keep(self, features: Tensor, first: int, kept: Tensor) -> None:
        """What the step gave for so many samples; where `kept` (b,) is False, that of the step before stays."""
        if self._now is None or self._next is None:
            self._now = features.new_zeros(self.count, *features.shape[1:])
            self._next = self._now.clone()
        place = slice(first, first + len(features))
        self._next[place] = torch.where(kept.view(-1, 1, 1, 1), features, self._now[place])

    def turn(self, first: int, count: int) -> None:
        """The pass of so many samples is done."""
        if self._now is not None and self._next is not None:
            self._now[first : first + count] = self._next[first : first + count]

    def forget(self, index: Tensor) -> None:
        """Other pictures begin in these samples."""
        for features in (self._now, self._next):
            if features is not None:
                features[index] = 0


def _each(function: Callable[..., Tensor], *conditions: Any) -> Any:
    """The condition whose tensors are those of the given ones, one by one, under the function: nested tuples."""
    if isinstance(conditions[0], Tensor):
        return function(*conditions)
    parts = [_each(function, *parts) for parts in zip(*conditions, strict=True)]
    kind = type(conditions[0])
    return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
