"""The training loop: restore, then step after step: batch, loss, update, and at intervals log, sample, commit.

Nothing here knows Ray: the same loop runs in Ray Train's workers, under torchrun, and in one process.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymuse.config.errors import UserError
from raymuse.config.training import MaskedConfig, TrainConfig
from raymuse.masking import NETWORK
from raymuse.tracking.run import Run
from raymuse.training.ema import Ema
from raymuse.training.engine import Engine, full_weights, global_sum
from raymuse.training.evaluation import Evaluation, evaluation_of
from raymuse.training.length import Length
from raymuse.training.lineage import lineage, write_record
from raymuse.training.optimizers import learning_rate_scale
from raymuse.training.order import share, share_size
from raymuse.training.saving import Report, Saver, agreed, barrier
from raymuse.training.scaling import LossScale
from raymuse.training.stopping import Stopping, never
from raymuse.training.task import Task
from raymuse.training.utilisation import Utilisation


class Loop:
    """One training on one rank.

    Args:
        config: the recipe.
        task: what is trained.
        engine: owns parameters and optimizer.
        run: where rank 0 logs.
        report: called on all ranks with metrics and, after a commit, the checkpoint's folder.
        say: rank 0's progress, a line at a time.
        stopping: whether this rank was asked to stop; where one was, all end after a checkpoint.
        next_step: called after every step (a profiler's).
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        engine: Engine,
        run: Run,
        report: Report,
        say: Callable[[str], None],
        stopping: Stopping = never,
        next_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.task = task
        self.engine = engine
        self.run = run
        self.say = say
        self.stopping = stopping
        self.next_step = next_step
        self.root = Path(config.output)
        self.ema = Ema(engine, config.ema_decay) if config.ema_decay is not None else None
        self.scaling = LossScale(config.precision)
        self.clock = Clock(config.batch_size)
        self.length = Length(config, say)
        self.utilisation = Utilisation(config, task)
        self.worker_seconds = 0.0
        self.lineage = {**lineage(config), **({} if run.id is None else {"run": run.id})} if engine.rank == 0 else {}
        self.asked = False
        self.loss_since, self.steps_since = 0.0, 0
        self.last_loss: float | None = None
        self.skipped = self.skipped_in_a_row = 0
        self.rows = exact_rows(config) or 1  # that the batch is cut between
        self.micro_batch, self.accumulation = micro_batches(config, engine.world)
        self.drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in task.module.modules())
        self.evaluation = evaluation_of(config, task, self.micro_batch)
        self.held_out: float | None = None  # of the weights as they are now, where it was measured
        best_by = ("loss" if self.evaluation is None else "eval_loss") if config.checkpoint.keep_best else None
        self.saver = Saver(config, task, engine, self.ema, report, say, best_by)

    def fit(self) -> bool:
        """Train to the end, from the newest checkpoint where there is one, and save the model.

        Returns:
            False where the training was asked to stop before its end: a checkpoint then holds what was done.
        """
        start = self._restore()
        self.run.begin(start)
        if start == 0 and isinstance(self.config, MaskedConfig) and agreed(self.run.identity is not None):
            self._sample(0)  # MLflow's grid of pictures opens on step 0
        done = start
        while done < self.length.steps:
            self.held_out = None
            metrics = self._step(done)
            self.next_step()
            done, last = done + 1, done + 1 == self.length.steps
            if done % self.config.log_every == 0 or last:
                self._log(metrics, done)
            if self.evaluation is not None and self._measures(self.evaluation, done, last):
                self._evaluate(self.evaluation, done)
            if (done % self.config.sample_every == 0 and not self.asked) or last:
                self._sample(done)
            if done % self.config.checkpoint.every == 0 or last or self.asked:
                self._save(done, metrics)
            if self.asked and not last:
                return self._stop(done)
        self.saver.finish()
        self._finish()
        return True

    def _measures(self, evaluation: Evaluation, done: int, last: bool) -> bool:
        """Whether the held-out loss is measured after so many steps: a checkpoint that may be the best needs it."""
        kept = self.config.checkpoint
        due = done % evaluation.wanted.every == 0 or (kept.keep_best and done % kept.every == 0)
        return (due or last) and not self.asked

    def _restore(self) -> int:
        """The step to go on with. Collective."""
        found = self.saver.restore()
        self.skipped = found.state.get("skipped", 0) if found is not None else 0
        self.scaling.load(found.state.get("loss_scale") if found is not None else None)
        self.worker_seconds = found.state.get("worker_seconds", 0.0) if found is not None else 0.0
        self.lineage["resumed_from"] = found.step if found is not None else None
        self.length.resume(found.state.get("horizon") if found is not None else None)
        return found.step if found is not None else 0

    def _stop(self, done: int) -> bool:
        self.saver.finish()
        if self.engine.rank == 0:
            self.say(f"asked to stop: step {done} is kept")
            self.run.flush(5)
        return False

    def _step(self, step: int) -> dict[str, Tensor | float]:
        """One optimizer step on the global batch; sums over this rank's rows, and the rank's denominator."""
        self.clock.start()
        batches = list(self._batches(step))
        self.clock.loaded()
        count = self._agree(sum(self.task.count(batch) for batch in batches))
        sums: dict[str, Any] = {"loss": 0.0}
        self.engine.loss_scale = self.scaling.value
        for number, batch in enumerate(batches, self.engine.rank * self.accumulation):
            if self.drops:
                draw = np.random.SeedSequence([self.config.seed, NETWORK, step, number])
                torch.manual_seed(int(draw.generate_state(1, np.uint64)[0]))
            loss, extra = self.engine.forward(batch)
            finite = loss.detach() * 0 + 1  # else not a number, so that the gradients of all ranks are none either
            self.engine.backward(loss * finite / count)
            for name, value in {"loss": loss.detach(), **extra}.items():
                sums[name] = sums.get(name, 0.0) + value / count
        scale = learning_rate_scale(step, self.length.horizon, self.config.optimizer)
        norm = self.engine.step(scale)
        if math.isfinite(norm):
            self.loss_since, self.steps_since = self.loss_since + float(sums["loss"]), self.steps_since + 1
        care = self._cared_for(step) if math.isfinite(norm) else self._not_taken(step, float(sums["loss"]))
        seconds = self.clock.stop()
        self.worker_seconds += seconds * self.engine.world
        self.length.took(seconds, step + 1)
        same = {**care, "grad_norm": norm, "lr_scale": scale, "skipped_steps": self.skipped}
        if self.scaling.scales:
            same["loss_scale"] = self.engine.loss_scale
        return {**sums, **{f"={name}": value for name, value in same.items()}}

    def _agree(self, mine: float) -> float:
        """The global denominator of the step, in one message with what all ranks must know of each other. Collective.

        Whether one was asked to stop; and whether all have written their shares of a checkpoint, which then counts.
        """
        told = torch.tensor([mine, float(self.stopping()), float(self.saver.busy)], dtype=torch.float64)
        count, asked, busy = global_sum(told).tolist()
        self.asked = asked > 0
        if not busy:
            self.saver.finish()
        return float(count)

    def _cared_for(self, step: int) -> dict[str, float]:
        """What follows a step that changed the weights."""
        self.skipped_in_a_row = 0
        self.scaling.fitted()
        care = self.task.after_step(step, self.engine)
        if self.ema is not None:
            self.ema.update()
        return care

    def _not_taken(self, step: int, loss: float) -> dict[str, float]:
        """A step that changed nothing: its gradients, scaled, were more than fp16 holds; or there is something wrong.

        Collective.
        """
        self.task.skipped()
        wrong = float(global_sum(torch.tensor([float(not math.isfinite(loss))])))
        if not wrong and self.scaling.lowered():
            return {}
        return self._passed_over(step)

    def _passed_over(self, step: int) -> dict[str, float]:
        """A step whose loss or gradients were not finite is counted; too many of them end the run."""
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
            self.saver.finish()
            raise UserError(
                f"{self.root}: loss or gradients were not finite in {self.skipped_in_a_row} steps in a row, up to step "
                f"{step + 1}; none of them changed the weights. Their rows stand in {self.root / 'skipped.jsonl'}. "
                "Try a lower optimizer.lr, optimizer.clip_norm, or precision=fp32, into another output."
            )
        return {}

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        positions, weights = share(step, self.config.batch_size, self.engine.rank, self.engine.world, self.rows)
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
        values.update(self.utilisation.of(self.clock.seconds_per_step))
        if self.engine.rank == 0:
            self.run.metrics(values, done)
            left = (self.length.steps - done) * self.clock.seconds_per_step
            self.say(
                f"step {done}/{self.length.steps}  loss {values['loss']:.4f}  "
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
            self.root.mkdir(parents=True, exist_ok=True)
            picture.save(self.root / "samples.png")
        self.clock.restart()

    def _evaluate(self, evaluation: Evaluation, done: int) -> None:
        values = evaluation.measure(self.engine, self.ema)
        self.held_out = values["eval_loss"]
        if self.engine.rank == 0:
            self.run.metrics(values, done)
            self.say(f"step {done}/{self.length.steps}  held-out loss {values['eval_loss']:.4f}")
        self.clock.restart()

    def _best_weights(self) -> dict[str, Tensor]:
        """The average's weights where there is one. Collective."""
        return self.ema.weights() if self.ema is not None else full_weights(self.engine)

    def _save(self, done: int, metrics: dict[str, Tensor | float]) -> None:
        """Begin a checkpoint, with what `keep_best` goes by: held-out loss, or mean since the one before. Collective.

        One that is written since the training was asked to stop has no held-out loss: there is no time to measure it.
        """
        total = float(global_sum(torch.tensor([self.loss_since], dtype=torch.float64)))
        mean = total / self.steps_since if self.steps_since else None
        state: dict[str, Any] = {"skipped": self.skipped, "loss": mean, "steps": self.steps_since}
        state["horizon"] = self.length.horizon
        if self.held_out is not None:
            state["eval_loss"] = self.held_out
        state |= {"lineage": self.lineage, "worker_seconds": self.worker_seconds}
        if self.scaling.scales:
            state["loss_scale"] = self.scaling.state()
        self.saver.begin(done, {"step": float(done), "loss": self._global(metrics)["loss"]}, state)
        self.loss_since, self.steps_since, self.last_loss = 0.0, 0, mean
        self.clock.restart()

    def _finish(self) -> None:
        """Write `model/` (the average where there is one) and, beside an average, `model_raw/`. Collective."""
        raw = full_weights(self.engine)
        best = self._best_weights()
        if self.engine.rank == 0:
            facts = self.task.save(best, self.root / "model")
            write_record(self.config, self.length.steps, self.engine.world, self.worker_seconds, self.last_loss)
            if self.ema is not None:
                self.task.save(raw, self.root / "model_raw")
            numbers = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
            self.run.metrics(numbers, self.length.steps)
            self.run.flush(10)
        barrier()


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

    def stop(self) -> float:
        """Seconds of the step."""
        seconds = time.perf_counter() - self.began
        self.steps += 1
        self.busy += seconds
        return seconds

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
    rows = exact_rows(config)
    size = share_size(config.batch_size, world, rows or 1)
    micro = min(rows or config.micro_batch_size or size, size)
    return micro, -(-size // micro)


def exact_rows(config: TrainConfig) -> int | None:
    """Rows whose gradients are computed together whatever the number of workers; None: that is left to it."""
    return config.exact if isinstance(config, MaskedConfig) else None
