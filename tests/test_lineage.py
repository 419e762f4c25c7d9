"""What a training says of itself: how much of the hardware it used, what it took, and where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tiny
from raymuse.clusters.prices import read_prices
from raymuse.storage.checkpoint import newest
from raymuse.tracking.run import Run
from raymuse.training.alone import opened, train_alone
from raymuse.training.build import build_task
from raymuse.training.lineage import code_version
from raymuse.training.plan import plan_of
from raymuse.training.utilisation import PEAKS, Utilisation, flops_of_step, known_tflops, peak_tflops


@dataclass(frozen=True)
class Noted(Run):
    """A run that is not tracked, and keeps what was logged to it."""

    said: dict[str, object]
    metrics_at: dict[int, dict[str, float]]

    def params(self, values: Mapping[str, object]) -> None:
        self.said.update(values)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.metrics_at.setdefault(step, {}).update(values)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    return tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root / "encoders", shards))


def test_a_training_tells_its_use_its_cost_and_its_lineage(tokens: str, tmp_path: Path) -> None:
    config = tiny.base_config(tmp_path, tokens, steps=4, log_every=2, peak_tflops=0.001, checkpoint={"every": 2})
    run = Noted(None, Path(), {}, {})
    train_alone(config, run, opened(config))
    logged = run.metrics_at[4]
    assert {"loss", "learning_rate", "grad_norm", "samples_per_second", "data_wait", "mfu", "memory_gib"} <= set(logged)
    work = plan_of(config).flops * logged["samples_per_second"]
    assert logged["mfu"] == pytest.approx(work / 1e9, rel=1e-6)
    assert 0.05 < logged["memory_gib"] < 64
    record = json.loads(Path(config.output, "training.json").read_text())
    assert (record["steps"], record["batch_size"], record["workers"], record["device"]) == (4, 8, 1, "CPU")
    assert 0 < record["worker_hours"] < 1
    assert record["code"] == code_version() == run.said["lineage.code"]
    assert len(record["data"]) >= 64
    kept = newest(Path(config.output))
    assert kept is not None
    assert kept.state["lineage"] == {
        "code": code_version(),
        "data": record["data"],
        "input": tokens,
        "parent": None,
        "resumed_from": None,
    }
    assert kept.state["worker_seconds"] == pytest.approx(record["worker_hours"] * 3600)


def test_the_work_of_a_step_is_that_of_the_plan(tokens: str, tmp_path: Path) -> None:
    config = tiny.superres_config(tmp_path, tokens)
    assert flops_of_step(config, build_task(config)) == pytest.approx(plan_of(config).flops * config.batch_size)
    assert peak_tflops(config) is None
    assert "mfu" not in Utilisation(config, build_task(config)).of(1.0)


def test_the_peaks_are_those_of_the_price_table() -> None:
    assert {name: gpu.tflops for name, gpu in read_prices(None).gpus.items()} == PEAKS


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 790),
        ("NVIDIA A100-SXM4-80GB", 250),
        ("NVIDIA H100 80GB HBM3", 790),
        ("NVIDIA L40S", 290),
        ("NVIDIA L4", 97),
        ("Tesla T4", 52),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_a_gpu_is_known_by_its_name_alone(name: str, peak: float | None) -> None:
    assert known_tflops(name) == peak
