"""Metrics of stages, in the process that reports them; scraped from a cluster: test_jobs.py."""

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics
from ray.cluster_utils import Cluster
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

import tiny
from raymuse.clusters import watching
from raymuse.clusters.watching import PRICE_LABEL, Meter, price_per_hour
from raymuse.serving.watch import Metrics
from raymuse.tracking.run import Run, listening


def test_numbers_go_to_who_listens_also_while_tracking_is_off() -> None:
    heard: list[tuple[dict[str, float], int]] = []
    with listening(lambda values, step: heard.append((dict(values), step))):
        Run.off().metrics({"loss": 1}, 3)
    Run.off().metrics({"loss": 2}, 4)
    assert heard == [({"loss": 1.0}, 3)]


class Noted(Meter):
    """What would be exported, kept."""

    def __init__(self, stage: str, steps: int | None = None, images_per_step: int = 0) -> None:
        super().__init__(stage, steps, images_per_step)
        self.sums: dict[str, float] = {}
        for name, counter in self.counters.items():
            counter.inc = lambda value, _tags, name=name: self.sums.update({name: self.sums.get(name, 0.0) + value})
        for name, gauge in self.gauges.items():
            gauge.set = lambda value, _tags, name=name: self.sums.update({name: value})


def test_counts_add_up_and_never_fall() -> None:
    meter = Noted("pretokenize")
    meter.numbers({"rows": 10, "tokens": 640, "rejects": 1, "queue": 3, "rows_per_second": 5.0}, 1)
    meter.numbers({"rows": 25, "tokens": 1600, "rejects": 1, "queue": 2, "rows_per_second": 4.0}, 2)
    meter.paid(0.5)
    meter.paid(0.25)
    assert meter.sums == {"images": 25, "tokens": 1600, "rejects": 1, "queue": 2, "rate": 4.0, "dollars": 0.75}


@pytest.mark.parametrize(("began", "logged"), [(60, (61, 65)), (45, (60, 65)), (0, (20, 40, 65))], ids=str)
def test_a_training_counts_the_steps_of_this_attempt(began: int, logged: tuple[int, ...]) -> None:
    """However seldom it logs, and wherever the checkpoint lay that it went on from."""
    meter = Noted("train-base", steps=100, images_per_step=8)
    with listening(meter.numbers):
        Run.off().begin(began)
        for step in logged:
            Run.off().metrics({"loss": 2.0}, step)
    done = 65 - began
    assert (meter.sums["steps"], meter.sums["images"], meter.sums["queue"]) == (done, 8 * done, 35)


@pytest.mark.parametrize(("workers", "counted"), [(0, {"steps": 20, "images": 160, "queue": 0}), (2, {})], ids=str)
def test_a_driver_counts_the_steps_of_a_training_that_it_does_itself(
    workers: int, counted: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Workers of Ray Train count their own."""
    meters: list[Noted] = []
    monkeypatch.setattr(watching, "Meter", lambda *words: meters.append(Noted(*words)) or meters[-1])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(watching, "price_per_hour", lambda: 0.0)
    config = tiny.base_config(tmp_path, "nowhere", workers=workers, steps=20, batch_size=8)
    with watching.watching_driver(config):
        if workers == 0:
            Run.off().begin(0)
            for step in (5, 20):
                Run.off().metrics({"loss": 2.0}, step)
    (meter,) = meters
    assert meter.tags["stage"] == "train-base"
    assert {name: meter.sums[name] for name in counted} == counted
    assert counted or not meter.sums


def test_nodes_say_what_they_cost(ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert price_per_hour() == 0.0
    nodes = [{"Alive": True, "Labels": {PRICE_LABEL: "1.25"}}, {"Alive": True, "Labels": {PRICE_LABEL: "a lot"}}]
    nodes += [{"Alive": False, "Labels": {PRICE_LABEL: "9"}}, {"Alive": True, "Labels": {PRICE_LABEL: "0.25"}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert price_per_hour() == 1.5


def test_a_head_that_is_away_does_not_end_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([7200.0, RuntimeError("the head is away"), 3600.0])
    paid: list[float] = []
    ended = threading.Event()

    def price() -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Paid(Noted):
        def paid(self, dollars: float) -> None:
            paid.append(dollars)
            if len(paid) == 2:
                ended.set()

    clock = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(watching, "PRICE_SECONDS", 0.01)
    monkeypatch.setattr(watching, "price_per_hour", price)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    watching._pay(Paid("train-base"), ended, lambda spent: None)
    assert paid == [2.0, 2.0, 1.0]  # a second each at 7200, at what was known last, and at 3600 an hour


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((Path(__file__).parents[1] / "cluster" / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:ray_)?raymuse_\w+", target["expr"])
    }
    served = {sample.name for family in Metrics().registry.collect() for sample in family.samples} | {
        "raymuse_requests_total",
        "raymuse_request_seconds_bucket",
    }  # these have samples once there was a request
    counters = {f"ray_raymuse_{name}_total" for name in ("images", "tokens", "rejects", "steps", "dollars")}
    gauges = {f"ray_raymuse_{name}" for name in ("queue", "rate", "loss")}
    assert asked <= served | counters | gauges
    assert counters <= asked
    assert {name.removeprefix("ray_raymuse_").removesuffix("_total") for name in counters | gauges} - {"rate"} == (
        set(watching._MEANING) - {"rate"}
    )
    nodes = {f"ray_{name}" for name in METRICS_GAUGES} | {
        family.name for family in AutoscalerPrometheusMetrics().registry.collect()
    }
    rays = {
        name for panel in dashboard["panels"] for name in words_of(panel) if name.startswith(("ray_", "autoscaler_"))
    }
    assert {name for name in rays if not name.startswith("ray_raymuse_")} <= nodes
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def words_of(panel: dict[str, Any]) -> list[str]:
    return [word for target in panel["targets"] for word in re.findall(r"\w+", target["expr"])]
