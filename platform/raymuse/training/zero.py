"""DeepSpeed ZeRO behind the engine's interface."""

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raymuse.config.training import OptimizerConfig
from raymuse.training import moments
from raymuse.training.engine import one_by_one, rank_and_world, unscale
from raymuse.training.exact import ExactSums
from raymuse.training.muon import Muon, Place, Shards
from raymuse.training.optimizers import build_optimizer

# Module -> what DeepSpeed takes from it. It asks of every optimizer whether it is that Muon: ours never is.
_UNUSED = {
    "deepspeed.autotuning.autotuner": "Autotuner",
    "deepspeed.runtime.zero.muon.muon_optimizer": "MuonWithAuxAdam",
    "deepspeed.runtime.zero.muon.original_muon": "muon_update",
}


GATHERED = 2**24
"""Numbers that are made whole at a time, to be read."""


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0 to 3; the model code knows nothing of it.

    Args:
        pieces: at stage 1 or 2, micro batches of a step, over all ranks, whose gradients are to be summed exactly;
            None: as they come.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        zero_stage: int,
        micro_batch: int,
        accumulation: int,
        offload: bool = False,
        pieces: int | None = None,
    ) -> None:
        deepspeed = _import_deepspeed()
        # Its shared-memory collectives are built with a C++ compiler at start; gloo and NCCL need none.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.rank, self.world = rank_and_world()
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.loss_scale = 1.0
        self.zero_stage = zero_stage
        self.accumulation = accumulation
        self.clip_norm = config.clip_norm
        optimizer = build_optimizer(model, config, fused=pieces is None)
        self._moments = moments.moments(optimizer)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # ZeRO-3 takes a step while it is set up, which must not decay any weight
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(config, zero_stage, micro_batch, accumulation, offload),
        )
        self.module: nn.Module = self.engine.module
        self.parameters = dict(self.module.named_parameters())
        self._start_moments()
        if isinstance(optimizer, Muon) and zero_stage > 0:
            optimizer.layout = Shards(self.rank, self.world, {flat: places for flat, _, places in self._placed()})
        self.exact = None if pieces is None else ExactSums([self.parameters[name] for name in self.names], pieces)
        if self.exact is not None:
            self.optimizer.clip_grad = 0.0  # its norm depends on how many ranks add to it

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.engine(batch) if self.exact is None else self.module(batch)
        return loss, metrics

    def backward(self, loss: Tensor) -> None:
        if self.exact is not None:
            self.exact.backward(loss, self.loss_scale)
            return
        # DeepSpeed averages over ranks and micro batches; ours is a sum, normalised by the global count already.
        factor = float(self.world * self.accumulation)
        if self.zero_stage > 0:
            self.optimizer.loss_scaler.cur_scale = self.loss_scale  # of its own, with which it unscales and clips
        else:
            factor *= self.loss_scale
        self.engine.backward(loss * factor)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()

    def step(self, lr_scale: float) -> float:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * lr_scale
        if self.exact is not None:
            return self._exact_step(self.exact)
        if self.zero_stage > 0:
            self.engine.step()  # its own check leaves everything as it is where the norm is not finite
            return float(self.engine.get_global_grad_norm())
        unscale(self.parameters.values(), self.loss_scale)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if norm.isfinite():
            self.engine.step()
        else:
            self.optimizer.step = lambda: None  # hides the optimizer's own: the engine counts and clears as ever
            self.engine.step()
            del self.optimizer.step
        return float(norm)

    def _exact_step(self, exact: ExactSums) -> float:
        """Hand DeepSpeed this rank's share of the gradients where its own sums would have left them."""
        gradients, norm = exact.take(self.clip_norm)
        if norm.isfinite():
            found = dict(zip(exact.parameters, gradients, strict=True))
            zero = self.optimizer
            for group, (shard, parameters) in enumerate(self._flat_shards()):
                whole = shard.new_zeros(self.world * len(shard))
                for parameter, start in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                    whole[start : start + parameter.numel()] = found[parameter].flatten()
                zero.averaged_gradients[group] = [whole[self.rank * len(shard) :][: len(shard)].clone()]
            zero.step()
        return float(norm)

    def shards(self) -> list[Tensor]:
        if self.zero_stage > 0:
            return [flat.data for flat, _ in self._flat_shards()]
        return [self.parameters[name].data for name in self.names]

    def moments(self, name: str) -> tuple[str, ...]:
        return self._moments[self.parameters[name]]

    def read(self, name: str, state: str | None = None) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        if self.zero_stage == 0:
            value: Tensor = parameter.data if state is None else self._inner().state[parameter][state]
            return value
        if state is None:
            return _present(safe_get_full_fp32_param(parameter), name)
        return _present(safe_get_full_optimizer_state(parameter, state), f"{name} {state}")

    def each(self, state: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Several at a time: a message for each of hundreds would take most of a small checkpoint's time."""
        if self.zero_stage == 0:
            yield from one_by_one(self, self.names, state)
            return
        names = {self.parameters[name]: name for name in self.names}
        for flat, parameters, places in self._placed():
            if state is None or state in self._moments[parameters[0]]:
                shard = flat.data if state is None else self._inner().state[flat][state]
                for parameter, value in self._gathered(shard, parameters, places):
                    yield names[parameter], value

    def _gathered(self, shard: Tensor, parameters: list[Any], places: list[Place]) -> Iterator[tuple[Any, Tensor]]:
        """The full tensors of which all ranks' shards hold parts, `GATHERED` numbers a message. Collective."""
        mine = range(self.rank * len(shard), (self.rank + 1) * len(shard))
        for first, last in _batches([place.shape.numel() for place in places]):
            batch = places[first:last]
            whole = torch.zeros(sum(place.shape.numel() for place in batch), device=self.engine.device)
            done = 0
            for start, stop in (run for place in batch for run in place.runs):
                low, high = max(start, mine.start), min(stop, mine.stop)
                if low < high:
                    whole[done + low - start :][: high - low] = shard[low - mine.start : high - mine.start]
                done += stop - start
            dist.all_reduce(whole)
            values = torch.split(whole, [place.shape.numel() for place in batch])
            for parameter, place, value in zip(parameters[first:last], batch, values, strict=True):
                yield parameter, value.view(place.shape)

    def write(self, name: str, value: Tensor, state: str | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self.parameters[name]
        if self.zero_stage == 0:
            self.read(name, state).copy_(value)
        elif self.zero_stage == 3:
            self._write_partition(parameter, value, state)
        elif state is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, state)

    def publish(self) -> None:
        if self.zero_stage in (1, 2):
            self.optimizer.update_lp_params()
        elif self.zero_stage == 3:
            self.optimizer._partition_all_parameters()  # what a pass without gradients gathered may lie there still
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._refresh_persistent()

    def updates(self) -> int:
        return moments.updates(self._inner())

    def set_updates(self, count: int) -> None:
        moments.set_updates(self._inner(), count)

    def _inner(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _write_partition(self, parameter: Any, value: Tensor, state: str | None) -> None:
        """This rank's slice under ZeRO-3. DeepSpeed's own safe_set_full_* fails where the ranks do not divide it."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = torch.zeros(size * self.world)
        padded[: value.numel()] = value.flatten()
        local = padded[self.rank * size : (self.rank + 1) * size]
        if state is None:
            safe_set_local_fp32_param(parameter, local)
        else:
            safe_set_local_optimizer_state(parameter, local, state)

    def _refresh_persistent(self) -> None:
        """Small parameters stay gathered under ZeRO-3: gather them anew."""
        kept = self.optimizer.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _start_moments(self) -> None:
        """Zero moments and count, at once and at every stage: a checkpoint can then be written into them."""
        parameters = [self.parameters[name] for name in self.names]
        held = [(p, [p]) for p in parameters] if self.zero_stage == 0 else self._flat_shards()
        for tensor, whole in held:
            moments.begin(self._inner(), tensor, self._moments[whole[0]])
        if self.zero_stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_shards(self) -> list[tuple[Tensor, list[Any]]]:
        """The flat fp32 tensors that this rank's optimizer updates, each with the parameters that it is cut from."""
        zero = self.optimizer
        if self.zero_stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        return list(zip(zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups, strict=True))

    def _placed(self) -> Iterator[tuple[Tensor, list[Any], list[Place]]]:
        """Each flat tensor of `_flat_shards`, with its parameters and where they lie in all ranks' put together.

        One after another, then cut (stages 1 and 2), or each cut by itself (stage 3).
        """
        for number, (flat, parameters) in enumerate(self._flat_shards()):
            if self.zero_stage == 3:
                yield flat, parameters, _cut_apart(parameters, self.world)
            else:
                starts = self.optimizer.round_robin_bit16_offsets[number]
                runs = [((start, start + p.numel()),) for p, start in zip(parameters, starts, strict=True)]
                yield flat, parameters, [Place(p.shape, run) for p, run in zip(parameters, runs, strict=True)]


def _batches(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of runs of tensors of at most `GATHERED` numbers together, or of one."""
    first, held = 0, 0
    for number, size in enumerate(sizes):
        if number > first and held + size > GATHERED:
            yield first, number
            first, held = number, 0
        held += size
    if sizes:
        yield first, len(sizes)


def _cut_apart(parameters: list[Any], world: int) -> list[Place]:
    """ZeRO-3's places: a rank's shard is its slice of each parameter in turn, the last ranks' padded to one length."""
    size = sum(p.partition_numel() for p in parameters)
    places, first = [], 0
    for p in parameters:
        part, count = p.partition_numel(), p.ds_numel
        held = [(rank * size + first, min(part, count - rank * part)) for rank in range(world)]
        places.append(Place(p.ds_shape, tuple((start, start + length) for start, length in held if length > 0)))
        first += part
    return places


def _import_deepspeed() -> Any:
    """DeepSpeed without two of its parts, which it imports at every start and of which we use none.

    Its autotuner imports MLflow where it can: a second or two and 100 MiB a rank. Its Muon imports torch's compiler,
    another second. MLflow itself stays importable: a thread that sends records may ask for it meanwhile.
    """
    for name, kind in _UNUSED.items():
        unused = ModuleType(name)
        setattr(unused, kind, type(kind, (), {}))
        sys.modules.setdefault(name, unused)
    import deepspeed

    return deepspeed


def _deepspeed_config(
    config: OptimizerConfig, stage: int, micro_batch: int, accumulation: int, offload: bool
) -> Mapping[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _present(value: Tensor | None, what: str) -> Tensor:
    assert value is not None, f"DeepSpeed holds no {what}"
    return value
