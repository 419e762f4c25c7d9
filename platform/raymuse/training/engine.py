"""One training engine, two makers: plain data parallelism, and DeepSpeed ZeRO.

An engine owns the model's parameters and the optimizer, averages gradients over the ranks, and reads and sets *full*
tensors by name, whatever is sharded how. Everything that says `collective` must be called by all ranks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymuse.config.training import OptimizerConfig
from raymuse.training import moments
from raymuse.training.exact import ExactSums
from raymuse.training.optimizers import build_optimizer


class Engine(Protocol):
    """What the training loop needs of the thing that owns parameters and optimizer."""

    module: nn.Module
    rank: int
    world: int
    loss_scale: float  # factor on the loss, taken out of the gradients again before they are clipped; 1: none

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's loss and metrics on a batch."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro batch's gradients; `loss` is this rank's share of the global loss (they are summed)."""

    def step(self, lr_scale: float) -> float:
        """Sum gradients over the ranks, clip, update, clear; the gradient's norm before clipping. Collective.

        Where that is not finite nothing changes, neither weights nor moments, on any rank.
        """

    def shards(self) -> list[Tensor]:
        """The fp32 weights this rank updates, as the tensors themselves (an EMA follows them in place)."""

    def moments(self, name: str) -> tuple[str, ...]:
        """The names of a parameter's optimizer moments."""

    def read(self, name: str, state: str | None = None) -> Tensor:
        """A full fp32 parameter, or one of its optimizer moments as the optimizer keeps it. Collective."""

    def each(self, state: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter by its name, as `read` gives it, or that moment of all that have it, in any order.

        To be gone through, and copied on the way. Collective.
        """

    def write(self, name: str, value: Tensor, state: str | None = None) -> None:
        """Set a full fp32 parameter, or one of its optimizer moments. Collective."""

    def publish(self) -> None:
        """Let written parameters reach the module that computes. Collective; once after all writes."""

    def updates(self) -> int:
        """Optimizer steps taken (the bias correction's count)."""

    def set_updates(self, count: int) -> None:
        """Restore the bias correction's count."""


def rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) where torch.distributed is not set up."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def global_sum(values: Tensor) -> Tensor:
    """Sum over the ranks, on the device where `values` are, which stay as they are. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    summed = values.to("cuda" if dist.get_backend() == "nccl" else values.device, copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


class PlainEngine:
    """Plain data parallelism (every rank holds all): also one process, without any process group.

    Args:
        pieces: micro batches of a step, over all ranks, whose gradients are to be summed exactly; None: as they come.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, device: str = "cpu", pieces: int | None = None
    ) -> None:
        self.rank, self.world = rank_and_world()
        self.loss_scale = 1.0
        self.module = model.to(device)
        self.optimizer = build_optimizer(model, config, fused=pieces is None)
        self._moments = moments.moments(self.optimizer)
        self.clip_norm = config.clip_norm
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.exact = None if pieces is None else ExactSums(list(self.parameters.values()), pieces)
        for parameter in self.module.state_dict().values():
            if self.world > 1:
                dist.broadcast(parameter, 0)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.module(batch)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        if self.exact is not None:
            self.exact.backward(loss, self.loss_scale)
        else:
            (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]

    def step(self, lr_scale: float) -> float:
        norm = self._summed() if self.exact is None else self._take(self.exact)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr_scale
        if norm.isfinite():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def shards(self) -> list[Tensor]:
        return [parameter.data for parameter in self.parameters.values()]

    def moments(self, name: str) -> tuple[str, ...]:
        return self._moments[self.parameters[name]]

    def read(self, name: str, state: str | None = None) -> Tensor:
        parameter = self.parameters[name]
        value: Tensor = parameter.data if state is None else self.optimizer.state[self._begun(parameter)][state]
        return value

    def each(self, state: str | None = None) -> Iterator[tuple[str, Tensor]]:
        return one_by_one(self, self.parameters, state)

    def write(self, name: str, value: Tensor, state: str | None = None) -> None:
        self.read(name, state).copy_(value)

    def publish(self) -> None:
        """Parameters are the module's own: nothing to do."""

    def updates(self) -> int:
        return moments.updates(self.optimizer)

    def set_updates(self, count: int) -> None:
        for parameter in self.parameters.values():
            self._begun(parameter)
        moments.set_updates(self.optimizer, count)

    def _begun(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter, with moments also before the first step."""
        if not self.optimizer.state[parameter]:
            moments.begin(self.optimizer, parameter, self._moments[parameter])
        return parameter

    def _take(self, exact: ExactSums) -> Tensor:
        """Let the parameters have the step's gradients, clipped; their norm before."""
        gradients, norm = exact.take(self.clip_norm)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return norm

    def _summed(self) -> Tensor:
        """The same of gradients that were summed as they came."""
        self._sum_gradients()
        unscale(self.parameters.values(), self.loss_scale)
        bound = self.clip_norm if self.clip_norm is not None else float("inf")
        return nn.utils.clip_grad_norm_(self.parameters.values(), bound)

    def _sum_gradients(self) -> None:
        """One all-reduce for all gradients: they are small here, and one message beats hundreds."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Take a factor on the loss out of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1 and gradients:
        torch._foreach_div_(gradients, scale)


@contextmanager
def swapped(engine: Engine, average: list[Tensor]) -> Iterator[None]:
    """Inside, the engine's fp32 weights are the average's; its optimizer must not step meanwhile."""
    shards = engine.shards()
    kept = [shard.clone() for shard in shards]
    for shard, value in zip(shards, average, strict=True):
        shard.copy_(value)
    try:
        yield
    finally:
        for shard, value in zip(shards, kept, strict=True):
            shard.copy_(value)


def full_weights(engine: Engine) -> dict[str, Tensor]:
    """Every trained parameter, full, fp32, on the CPU, on every rank. Collective."""
    found = {name: value.detach().float().to("cpu", copy=True) for name, value in engine.each()}
    return {name: found[name] for name, _ in engine.module.named_parameters() if name in found}


def one_by_one(engine: Engine, names: Iterable[str], state: str | None) -> Iterator[tuple[str, Tensor]]:
    """An engine's `each`, where nothing is gained by reading several at once."""
    return ((name, engine.read(name, state)) for name in names if state is None or state in engine.moments(name))
