"""The loss on held-out token shards: at given masking ratios, without dropout, on all ranks together.

B samples, h w grid.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from raymuse.config.errors import UserError
from raymuse.config.training import EvaluationConfig, GeneratorConfig, SuperresConfig, TrainConfig
from raymuse.masking import hide
from raymuse.training.ema import Ema
from raymuse.training.engine import Engine, global_sum, swapped
from raymuse.training.order import share
from raymuse.training.task import Batch
from raymuse.training.tokens import TokenStream

if TYPE_CHECKING:
    from raymuse.training.masked import MaskedTask


class Evaluation:
    """Measures the same rows, masked at the same places, each time.

    Args:
        micro_batch: rows that a rank holds at once.

    Raises:
        UserError: for shards that were made for other parts than the training's.
    """

    def __init__(self, config: GeneratorConfig, wanted: EvaluationConfig, task: "MaskedTask", micro_batch: int) -> None:
        own: dict[str, Any] = {"input": wanted.input, "text_encoder": config.text_reader}
        own |= {"caption_dropout": 0.0, "rectangle_share": 0.0}
        held = type(config).model_validate({**config.model_dump(exclude={"evaluation", "stream"}), **own})
        self.stream = TokenStream(held, task.device, text_trained=bool(config.lora and config.lora.text_targets))
        self.wanted, self.seed, self.micro_batch = wanted, config.seed, micro_batch
        self.mask_id = task.network.config.mask_id
        mine, theirs = (_sizes(stream) for stream in (self.stream, task.stream))
        if mine != theirs:
            raise UserError(
                f"evaluation.input: {wanted.input} holds grids, codes and text tokens of {mine}, and the training "
                f"{theirs}. Pretokenize both alike."
            )
        if wrong := differing(self.stream.encoders(), task.stream.encoders()):
            raise UserError(
                f"evaluation.input: {wanted.input} was encoded by another {' and another '.join(wrong)} than "
                f"{config.source}. Pretokenize both by the same parts."
            )
        self.rows = min(wanted.rows, len(self.stream.store))

    def measure(self, engine: Engine, ema: Ema | None) -> dict[str, float]:
        """`eval_loss_at_0.3` for every masking ratio, and `eval_loss`, their mean; in nats an id. Collective."""
        sums = torch.zeros(len(self.wanted.mask_ratios), 2, dtype=torch.float64)
        with _evaluating(engine.module), _averaged(engine, ema), torch.no_grad():
            for batch in self._batches(engine):
                for number, ratio in enumerate(self.wanted.mask_ratios):
                    _, metrics = engine.module(self._masked(batch, ratio))
                    losses = [name for name in metrics if name.startswith("loss_at_") and not name.endswith(":of")]
                    sums[number, 0] += sum(float(metrics[name]) for name in losses)
                    sums[number, 1] += sum(float(metrics[f"{name}:of"]) for name in losses)
        sums_R, counts_R = global_sum(sums).unbind(dim=1)
        losses_R = (sums_R / counts_R).tolist()
        named = {f"eval_loss_at_{ratio:g}": loss for ratio, loss in zip(self.wanted.mask_ratios, losses_R, strict=True)}
        return {**named, "eval_loss": float(np.mean(losses_R))}

    def _batches(self, engine: Engine) -> Iterator[Batch]:
        """This rank's rows; every rank has equally many batches, whose rows beyond the last are of weight 0."""
        whole = self.micro_batch * engine.world
        for step in range(-(-self.rows // whole)):
            positions, weights = share(step, whole, engine.rank, engine.world)
            batch = self.stream.batch(positions, weights * (positions < self.rows).astype(np.float32), self.mask_id)
            yield {**batch, "positions": torch.from_numpy(positions)}

    def _masked(self, batch: Batch, ratio: float) -> Batch:
        """The batch with that share of its ids hidden."""
        targets: Tensor = batch["targets"]
        positions = batch["positions"].numpy()
        hidden = hide(targets.flatten(1).cpu(), positions, seed=self.seed, mask_id=self.mask_id, ratio=ratio)
        mask = hidden.mask.view_as(targets).to(targets.device) & batch["real"][:, None, None]
        rest = {name: value for name, value in batch.items() if name != "positions"}
        return {**rest, "ids": hidden.ids.view_as(targets).to(targets.device), "mask": mask}


def _sizes(stream: TokenStream) -> tuple[Any, ...]:
    """Grid, codes and text tokens; of a super-resolution also the grid and codes of the low-res ids."""
    sizes = (stream.grid, stream.codes, len(stream.empty_ids[0]))
    if not isinstance(stream.config, SuperresConfig):
        return sizes
    return (*sizes, stream.store.grid("low_ids"), stream.store.codes("low_ids"))


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of what is known of both, and is not the same."""
    both = [name for name in mine if mine[name] is not None and theirs.get(name) is not None]
    return [name for name in both if mine[name] != theirs[name]]


def evaluation_of(config: TrainConfig, task: object, micro_batch: int) -> Evaluation | None:
    """What the config asks for; None: nothing."""
    if not isinstance(config, GeneratorConfig) or config.evaluation is None:
        return None
    from raymuse.training.masked import MaskedTask

    assert isinstance(task, MaskedTask)
    return Evaluation(config, config.evaluation, task, micro_batch)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped; after it every part is as it was, a frozen text encoder without dropout too."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _averaged(engine: Engine, ema: Ema | None) -> Iterator[None]:
    """Inside, the module computes with the average, where there is one. Collective."""
    if ema is None:
        yield
        return
    with swapped(engine, ema.average):
        engine.publish()
        yield
    engine.publish()
