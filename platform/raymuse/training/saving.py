"""A training's checkpoints: taken between two steps, written while the next ones run, and gone on from.

What is on the disk is `storage/checkpoint.py`'s. A rank copies its share to the CPU's memory and a thread of its own
writes it; after all ranks' threads have finished, rank 0 makes the checkpoint count. Everything that says `collective`
must be called by all ranks.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.config.training import TrainConfig
from raymuse.storage import checkpoint as store
from raymuse.storage.manifest import FileRecord
from raymuse.training.ema import Ema
from raymuse.training.engine import Engine
from raymuse.training.task import Task

Report = Callable[[dict[str, float], Path | None], None]


@dataclass(frozen=True)
class _Begun:
    """A checkpoint that is being written."""

    step: int
    share: "Future[FileRecord]"
    metrics: dict[str, float]
    state: dict[str, Any]


class Saver:
    """Saves and restores one training on one rank.

    Args:
        report: called on all ranks with metrics and the checkpoint's folder, after it counts.
        say: rank 0's progress, a line at a time.
        best_by: number of the state by which the best checkpoint is kept as well; None: it is not.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        engine: Engine,
        ema: Ema | None,
        report: Report,
        say: Callable[[str], None],
        best_by: str | None = None,
    ) -> None:
        self.config = config
        self.task = task
        self.engine = engine
        self.ema = ema
        self.report = report
        self.say = say
        self.best_by = best_by
        self.root = Path(config.output)
        self.begun: _Begun | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    @property
    def busy(self) -> bool:
        """Whether this rank still writes its share."""
        return self.begun is not None and not self.begun.share.done()

    def begin(self, step: int, metrics: dict[str, float], state: Mapping[str, Any]) -> None:
        """Take the state after `step` steps and let it be written; waits for the one before. Collective.

        Args:
            metrics: for `report`.
            state: plain values that the checkpoint keeps beside ours.
        """
        self.finish()
        kept = {
            "updates": self.engine.updates(),
            "ema_updates": self.ema.updates if self.ema is not None else 0,
            **state,
        }
        share = self._share()
        folder = store.folder_of(self.root, step)
        self.begun = _Begun(
            step, self._writer.submit(store.write_share, folder, self.engine.rank, share), metrics, kept
        )

    def finish(self) -> None:
        """Wait for the shares of the checkpoint begun, if any, and make it count. Collective."""
        if self.begun is None:
            return
        begun, self.begun = self.begun, None
        folder = store.folder_of(self.root, begun.step)
        records = _gather_objects(begun.share.result())
        if self.engine.rank == 0:
            store.commit(folder, begun.step, records, begun.state)
            store.prune(self.root, self.config.checkpoint.keep, begun.step, best_by=self.best_by)
        barrier()
        self.report(begun.metrics, folder)

    def restore(self) -> store.Checkpoint | None:
        """Set everything from the newest whole checkpoint; None where there is none. Collective."""
        found = self._newest()
        if found is None:
            return None
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
        self.engine.publish()
        extra = {name.removeprefix("extra/"): value for name, value in tensors.items() if name.startswith("extra/")}
        self.task.load_extra_state(extra)
        if self.engine.rank == 0:
            self.say(f"going on from step {found.step} ({found.folder})")
        return found

    def _newest(self) -> store.Checkpoint | None:
        """The newest whole checkpoint as rank 0 sees the folder: on a shared disk others may see it later. Collective.

        Raises:
            OSError: it is not there, or not whole, for this rank.
        """
        first = store.newest(self.root, self.say) if self.engine.rank == 0 else None
        folder = agreed(first.folder if first is not None else None)
        if folder is None or first is not None:
            return first
        found, problem = store.read(folder)
        if found is None:
            raise OSError(f"{folder}: rank 0 goes on from it, and rank {self.engine.rank} cannot: {problem}")
        return found

    def _share(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of the full tensors that this rank writes: every world-th parameter. Collective."""
        numbers = {name: number for number, name in enumerate(self._names())}
        moments = sorted({moment for name in numbers for moment in self.engine.moments(name)})
        kinds = {"weight": self.engine.each(), **{moment: self.engine.each(moment) for moment in moments}}
        if self.ema is not None:
            kinds["ema"] = self.ema.each()
        tensors: dict[str, Tensor] = {}
        for kind, values in kinds.items():
            for name, value in values:
                if numbers[name] % self.engine.world == self.engine.rank:
                    tensors[f"{kind}/{name}"] = _copied(value)
        if self.engine.rank == 0:
            tensors.update({f"extra/{name}": _copied(value) for name, value in self.task.extra_state().items()})
        return tensors

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

    def _names(self) -> list[str]:
        return [name for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad]


def barrier() -> None:
    """Wait for all ranks, where there are several."""
    if dist.is_initialized():
        dist.barrier()


def agreed(mine: Any) -> Any:
    """What rank 0 says. Collective."""
    if not dist.is_initialized():
        return mine
    said = [mine]
    dist.broadcast_object_list(said, 0)
    return said[0]


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _gather_objects(mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered
