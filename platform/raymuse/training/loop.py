"""The training loop: restore, then step after step: batch, loss, update, and at intervals log, sample, commit.

Nothing here knows Ray: the same loop runs in Ray Train's workers, under torchrun, and in one process.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.config.training import TrainConfig
from raymuse.storage import checkpoint as store
from raymuse.tracking.run import Run
from raymuse.training.ema import Ema
from raymuse.training.engine import Engine, full_weights, global_sum
from raymuse.training.optimizers import learning_rate_scale
from raymuse.training.order import share
from raymuse.training.task import Task

Report = Callable[[dict[str, float], Path | None], None]


class Loop:
    """One training on one rank.

    Args:
        config: the recipe.
        task: what is trained.
        engine: owns parameters and optimizer.
        run: where rank 0 logs.
        report: called on all ranks with metrics and, after a commit, the checkpoint's folder.
        say: rank 0's progress, a line at a time.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        engine: Engine,
        run: Run,
        report: Report,
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.task = task
        self.engine = engine
        self.run = run
        self.report = report
        self.say = say
        self.root = Path(config.output)
        self.ema = Ema(engine, config.ema_decay) if config.ema_decay is not None else None
        self.clock = Clock(config.batch_size)
        self.skipped = self.skipped_in_a_row = 0
        self.micro_batch, self.accumulation = micro_batches(config, engine.world)

    def fit(self) -> None:
        """Train to `config.steps`, from the newest checkpoint where there is one, and save the model."""
        start = self._restore()
        for step in range(start, self.config.steps):
            metrics = self._step(step)
            done = step + 1
            if done % self.config.log_every == 0 or done == self.config.steps:
                self._log(metrics, done)
            if done % self.config.sample_every == 0 or done == self.config.steps:
                self._sample(done)
            if done % self.config.checkpoint.every == 0 or done == self.config.steps:
                self._commit(done, metrics)
        self._finish()

    def _step(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step on the global batch; sums over this rank's rows, and the rank's denominator."""
        self.clock.start()
        batches = list(self._batches(step))
        self.clock.loaded()
        mine = sum(self.task.count(batch) for batch in batches)
        count = float(global_sum(torch.tensor([mine], dtype=torch.float64)))
        sums: dict[str, Any] = {"loss": 0.0}
        for batch in batches:
            loss, extra = self.engine.forward(batch)
            finite = loss.detach() * 0 + 1  # else not a number, so that the gradients of all ranks are none either
            self.engine.backward(loss * finite / count)
            for name, value in {"loss": loss.detach(), **extra}.items():
                sums[name] = sums.get(name, 0.0) + value / count
        scale = learning_rate_scale(step, self.config.steps, self.config.optimizer)
        norm = self.engine.step(scale)
        care = self._cared_for(step) if math.isfinite(norm) else self._passed_over(step)
        self.clock.stop()
        same = {**care, "grad_norm": norm, "lr_scale": scale, "skipped_steps": self.skipped}
        return {**sums, **{f"={name}": value for name, value in same.items()}}

    def _cared_for(self, step: int) -> dict[str, float]:
        """What follows a step that changed the weights."""
        self.skipped_in_a_row = 0
        care = self.task.after_step(step, self.engine)
        if self.ema is not None:
            self.ema.update()
        return care

    def _passed_over(self, step: int) -> dict[str, float]:
        """A step whose loss or gradients were not finite changed nothing; too many of them end the run."""
        self.task.skipped()
        self.skipped += 1
        self.skipped_in_a_row += 1
        positions = np.arange(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        record = {"step": step + 1, "keys": self.task.keys(positions)}
        if self.engine.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            line, path = json.dumps(record) + "\n", self.root / "skipped.jsonl"
            if not path.exists() or line not in path.read_text():  # a resume may come by here again
                with path.open("a") as lines:
                    lines.write(line)
            self.say(f"step {step + 1}: loss or gradients are not finite; skipped (its rows: skipped.jsonl)")
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise UserError(
                f"{self.root}: loss or gradients were not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{step + 1}; none of them changed the weights. Their rows stand in {self.root / 'skipped.jsonl'}. "
                "Try a lower optimizer.lr, optimizer.clip_norm, or precision=fp32, into another output."
            )
        return {}

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        positions, weights = share(step, self.config.batch_size, self.engine.rank, self.engine.world)
        cuts = range(0, self.micro_batch * self.accumulation, self.micro_batch)
        pad = self.micro_batch * self.accumulation - len(positions)
        positions = np.concatenate([positions, np.repeat(positions[-1:], pad)])
        weights = np.concatenate([weights, np.zeros(pad, dtype=np.float32)])
        return [
            self.task.batch(positions[cut : cut + self.micro_batch], weights[cut : cut + self.micro_batch])
            for cut in cuts
        ]

    def _log(self, metrics: dict[str, Tensor | float], done: int) -> None:
        values = self._global(metrics)
        values["learning_rate"] = values.pop("lr_scale") * self.config.optimizer.lr
        values.update(self.clock.rates())
        if self.engine.rank == 0:
            self.run.metrics(values, done)
            left = (self.config.steps - done) * self.clock.seconds_per_step
            self.say(
                f"step {done}/{self.config.steps}  loss {values['loss']:.4f}  "
                f"{values['samples_per_second']:.0f} samples/s  {left:.0f} s left"
            )

    def _global(self, metrics: dict[str, Tensor | float]) -> dict[str, float]:
        """Sums over the ranks; names that start with `=` are the same on all ranks already. Collective."""
        names = sorted(name for name in metrics if not name.startswith("="))
        summed = global_sum(torch.tensor([float(metrics[name]) for name in names], dtype=torch.float64))
        same = {name[1:]: float(value) for name, value in metrics.items() if name.startswith("=")}
        sums = dict(zip(names, summed.tolist(), strict=True))
        means = {
            name: value / sums.get(f"{name}:of", 1.0) for name, value in sums.items() if sums.get(f"{name}:of") != 0
        }
        return {**{name: value for name, value in means.items() if not name.endswith(":of")}, **same}

    def _sample(self, done: int) -> None:
        weights = self._best_weights()
        picture = self.task.sample(weights) if self.engine.rank == 0 else None
        if picture is not None:
            self.run.picture("samples", picture, done)
        self.clock.restart()

    def _best_weights(self) -> dict[str, Tensor]:
        """The average's weights where there is one. Collective."""
        return self.ema.weights() if self.ema is not None else full_weights(self.engine)

    def _commit(self, done: int, metrics: dict[str, Tensor | float]) -> None:
        """Every rank writes its share; after a barrier rank 0 makes the checkpoint count. Collective."""
        folder = store.folder_of(self.root, done)
        record = store.write_share(folder, self.engine.rank, self._share())
        records = _gather_objects(record)
        if self.engine.rank == 0:
            state = {
                "updates": self.engine.updates(),
                "ema_updates": self.ema.updates if self.ema is not None else 0,
                "skipped": self.skipped,
            }
            store.commit(folder, done, records, state)
            store.prune(self.root, self.config.checkpoint.keep, done)
        _barrier()
        self.report({"step": float(done), "loss": self._global(metrics)["loss"]}, folder)
        self.clock.restart()

    def _share(self) -> dict[str, Tensor]:
        """The full tensors that this rank writes: every world-th parameter. Collective."""
        tensors: dict[str, Tensor] = {}
        average = self.ema.weights() if self.ema is not None else {}
        for number, name in enumerate(self._names()):
            moments = {moment: self.engine.read(name, moment) for moment in self.engine.moments(name)}
            values = {"weight": self.engine.read(name), **moments}
            if number % self.engine.world == self.engine.rank:
                tensors.update({f"{kind}/{name}": value.clone() for kind, value in values.items()})
                if name in average:
                    tensors[f"ema/{name}"] = average[name]
        if self.engine.rank == 0:
            tensors.update({f"extra/{name}": value for name, value in self.task.extra_state().items()})
        return tensors

    def _restore(self) -> int:
        """Set everything from the newest whole checkpoint; the step to go on with. Collective."""
        found = store.newest(self.root, self._warn)
        if found is None:
            return 0
        tensors = found.tensors()
        self._require_moments(tensors, found.folder)
        if self.ema is not None:
            average = {name: tensors[f"ema/{name}"] for name in self._names()}
            self.ema.restore(average, found.state["ema_updates"])
        for name in self._names():
            self.engine.write(name, tensors[f"weight/{name}"])
            for moment in self.engine.moments(name):
                self.engine.write(name, tensors[f"{moment}/{name}"], moment)
        self.engine.set_updates(found.state["updates"])
        self.skipped = found.state.get("skipped", 0)
        self.engine.publish()
        extra = {name.removeprefix("extra/"): value for name, value in tensors.items() if name.startswith("extra/")}
        self.task.load_extra_state(extra)
        if self.engine.rank == 0:
            self.say(f"going on from step {found.step} ({found.folder})")
        return found.step

    def _require_moments(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Raise UserError where another optimizer wrote the checkpoint: its moments say nothing to this one."""
        for name in self._names():
            for moment in self.engine.moments(name):
                if f"{moment}/{name}" not in tensors:
                    raise UserError(
                        f"{folder}: the checkpoint holds no {moment} of {name}, which optimizer.name: "
                        f"{self.config.optimizer.name} needs: another optimizer wrote it. Go on with that one, or "
                        "train into another output."
                    )

    def _warn(self, sentence: str) -> None:
        if self.engine.rank == 0:
            self.say(sentence)

    def _names(self) -> list[str]:
        return [name for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad]

    def _finish(self) -> None:
        """Write `model/` (the average where there is one) and, beside an average, `model_raw/`. Collective."""
        raw = full_weights(self.engine)
        best = self._best_weights()
        if self.engine.rank == 0:
            facts = self.task.save(best, self.root / "model")
            if self.ema is not None:
                self.task.save(raw, self.root / "model_raw")
            numbers = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
            self.run.metrics(numbers, self.config.steps)
            self.run.flush(10)
        _barrier()


class Clock:
    """Steps and waits of the last interval."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        self.steps, self.busy, self.waiting = 0, 0.0, 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def loaded(self) -> None:
        self.waiting += time.perf_counter() - self.began

    def stop(self) -> None:
        self.steps += 1
        self.busy += time.perf_counter() - self.began

    def rates(self) -> dict[str, float]:
        """Rates since the last call; empty right after a restart."""
        if self.steps:
            self.seconds_per_step = self.busy / self.steps
        rates = {
            "samples_per_second": self.batch_size / max(self.seconds_per_step, 1e-9),
            "data_wait": self.waiting / max(self.busy, 1e-9),
        }
        self.restart()
        return rates


def micro_batches(config: TrainConfig, world: int) -> tuple[int, int]:
    """(rows a worker holds at once, micro batches a step)."""
    share_size = -(-config.batch_size // world)
    micro = min(config.micro_batch_size or share_size, share_size)
    return micro, -(-share_size // micro)


def _gather_objects(mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
