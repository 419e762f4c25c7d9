"""What a stage tells Prometheus, through Ray's own metrics: the numbers that it tells MLflow, and what they cost.

Ray exports them on every node under `ray_raymuse_...`; cluster/grafana.json shows them.

images, tokens, rejects, steps    counters of what is done
queue                             what is left: parts, pictures or steps
rate, loss                        images a second, and a training's loss
dollars                           price of the cluster's machines while the stage ran
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import ray
from ray.util.metrics import Counter, Gauge

from raymuse.config.base import StageConfig
from raymuse.config.recipe import stage_of
from raymuse.config.training import TrainConfig
from raymuse.tracking.provenance import JOB_VARIABLE
from raymuse.tracking.run import listening

PRICE_LABEL = "raymuse-dollars-per-hour"  # of a node, in cluster YAML under `labels`: what an hour of it costs
PRICE_SECONDS = 15.0

_LOG = logging.getLogger(__name__)

COUNTED = {
    **dict.fromkeys(("images", "rows", "pictures"), "images"),
    **dict.fromkeys(("rejects", "failed"), "rejects"),
    "tokens": "tokens",
}
SHOWN = {
    "queue": "queue",
    "loss": "loss",
    "rows_per_second": "rate",
    "pictures_per_second": "rate",
    "samples_per_second": "rate",
}
_MEANING = {
    "images": "images encoded, trained on or drawn",
    "tokens": "image ids written",
    "rejects": "inputs refused",
    "steps": "optimizer steps",
    "queue": "parts, pictures or steps left",
    "rate": "images a second",
    "loss": "loss of a training",
    "dollars": "price of the cluster's machines while the stage ran",
}


Spend = Callable[[Mapping[str, float]], None]  # told of what was spent since the last time, by name


def _forgotten(_spent: Mapping[str, float]) -> None:
    """Nobody asks."""


class Meter:
    """One stage's metrics of one process.

    Args:
        stage: name of the stage.
        steps: of a training in all, or at least; None: the stage is no training, and its steps are parts.
        images_per_step: of a training.
    """

    def __init__(self, stage: str, steps: int | None = None, images_per_step: int = 0) -> None:
        # Prometheus has a `job` of its own.
        self.tags = {"stage": stage, "submission": os.environ.get(JOB_VARIABLE, "local")}
        self.steps, self.images_per_step = steps, images_per_step
        names = tuple(self.tags)
        self.counters = {
            name: Counter(f"raymuse_{name}", _MEANING[name], names)
            for name in ("images", "tokens", "rejects", "steps", "dollars")
        }
        self.gauges = {name: Gauge(f"raymuse_{name}", _MEANING[name], names) for name in ("queue", "rate", "loss")}
        self.before: dict[str, float] = {}

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """What a stage logs; counts are of this process's work so far, and never fall.

        A training first says, with no values, at which step it begins: what came before it is another attempt's.
        """
        if self.steps is not None and not values:
            self.before["steps"] = float(step)
        for name, value in values.items():
            if name in COUNTED:
                self._count(COUNTED[name], float(value))
            elif name in SHOWN:
                self.gauges[SHOWN[name]].set(float(value), self.tags)
        if self.steps is not None and "loss" in values:
            self._count("steps", float(step))
            self.gauges["queue"].set(max(0.0, float(self.steps - step)), self.tags)

    def paid(self, dollars: float) -> None:
        """What the cluster's machines cost since the last call."""
        if dollars > 0:
            self.counters["dollars"].inc(dollars, self.tags)

    def _count(self, name: str, value: float) -> None:
        """Pass on what was added."""
        added = value - self.before.get(name, 0.0)
        self.before[name] = value
        if added > 0:
            self.counters[name].inc(added, self.tags)
            if name == "steps" and self.images_per_step:
                self.counters["images"].inc(added * self.images_per_step, self.tags)


@contextlib.contextmanager
def watching(
    stage: str,
    steps: int | None = None,
    images_per_step: int = 0,
    pays: bool = True,
    spend: Spend = _forgotten,
) -> Iterator[None]:
    """Inside, what the stage logs in this process goes to Prometheus as well; nothing happens without Ray.

    Args:
        pays: whether this process counts what the cluster costs: one of a stage does.
        spend: told of that, a few seconds at a time: `cpu_hours`, `gpu_hours`, and `dollars` where nodes have a price.
    """
    if not ray.is_initialized():
        yield
        return
    meter = Meter(stage, steps, images_per_step)
    ended = threading.Event()
    payer = threading.Thread(target=_pay, args=(meter, ended, spend), daemon=True)
    if pays:
        payer.start()
    try:
        with listening(meter.numbers):
            yield
    finally:
        ended.set()
        if pays:
            payer.join()


def watching_driver(config: StageConfig, spend: Spend = _forgotten) -> contextlib.AbstractContextManager[None]:
    """`watching` in a stage's driver, which counts what the cluster costs, and a training's steps where it trains."""
    name = stage_of(type(config))
    if isinstance(config, TrainConfig) and config.workers == 0:
        return watching(name, config.steps, config.batch_size, spend=spend)
    return watching(name, spend=spend)


def price_per_hour() -> float:
    """Dollars an hour of all living nodes that say in a label what they cost."""
    labels = (node.get("Labels", {}) for node in ray.nodes() if node["Alive"])
    return sum(_price(label[PRICE_LABEL]) for label in labels if PRICE_LABEL in label)


def _price(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


def _pay(meter: Meter, ended: threading.Event, spend: Spend) -> None:
    """Count until the stage has ended; while the head does not answer, at the price that was known last."""
    since, price, there = time.monotonic(), 0.0, {"CPU": 0.0, "GPU": 0.0}
    while True:
        last = ended.wait(PRICE_SECONDS)
        if not ray.is_initialized():
            return
        try:
            price = price_per_hour()
            there = ray.cluster_resources()
        except Exception as error:  # Ray raises several kinds, and none may end a stage's account
            _LOG.warning("cannot ask the cluster what it costs, and count with %g an hour: %s", price, error)
        now = time.monotonic()
        meter.paid(price * (now - since) / 3600)
        each_hour = {"cpu_hours": there.get("CPU", 0.0), "gpu_hours": there.get("GPU", 0.0), "dollars": price}
        spend({name: value * (now - since) / 3600 for name, value in each_hour.items() if value})
        since = now
        if last:
            return
