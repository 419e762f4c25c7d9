"""An elastic training on a real cluster whose nodes die, come and drain: the losses are those of one process."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.cluster_utils import Cluster

import tiny
from processes import wait_until
from raymuse.config.training import BaseConfig
from raymuse.stages import train as stage
from raymuse.storage import checkpoint
from raymuse.tracking.run import Run
from raymuse.training.build import build_task
from trainings import losses_of

STEPS, EVERY = 500, 5
BATCH, SHARD = 8, 100
PATIENCE = 300.0
SHAPE = {**tiny.UVIT, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}  # a step takes 0.1 s


@pytest.fixture(scope="module")
def new_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token shards of so many rows that none is seen twice, of 8 x 8 ids; the shared ones have 16 x 16."""
    root = tmp_path_factory.mktemp("rows")
    shards = tiny.write_shards(root / "shards", count=STEPS * BATCH, per_shard=SHARD)
    return tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root, shards), chunk_size=SHARD)


def config_of(root: Path, tokens: str, **changes: Any) -> BaseConfig:
    """A batch of eight, which three workers do not divide; one failure allowed, that of the node that dies."""
    values = {"ids": "image_ids", "batch_size": BATCH, "model": SHAPE, "optimizer": {"lr": 5e-4}}
    length = {"steps": STEPS, "log_every": 1, "checkpoint": {"every": EVERY, "keep": STEPS}}
    elastic = {"workers": {"min": 1, "max": 3}, "resources": {"trainers": 1}, "max_failures": 1}
    return tiny.base_config(root, tokens, **{**values, **length, **elastic, **changes})


class Nodes:
    """Nodes that workers are placed on, one each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes: list[Any] = []

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, resources={"trainers": 1}, include_log_monitor=False))

    def kill(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def drain(self, seconds: int) -> None:
        """A cloud's notice that the newest node goes."""
        ray = str(Path(sys.executable).with_name("ray"))
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        where = ["--address", self.cluster.address, "--node-id", self.nodes[-1].node_id]
        notice = ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run([ray, "drain-node", *where, *reason, *notice], check=True, timeout=60)


@pytest.fixture
def nodes(ray_cluster: Cluster) -> Iterator[Nodes]:
    nodes = Nodes(ray_cluster)
    yield nodes
    while nodes.nodes:
        with suppress(Exception):
            nodes.kill()


def worlds(output: Path) -> list[tuple[int, int]]:
    """(step, workers that wrote it) of every checkpoint."""
    found = []
    for path in sorted(output.glob("step-*/checkpoint.json")):
        record = json.loads(path.read_text())
        found.append((record["step"], len(record["files"])))
    return found


def change(nodes: Nodes, output: Path, did: list[str]) -> None:
    """Two nodes, then one, then three, then two."""

    def trained_by(count: int) -> None:
        wait_until(lambda: worlds(output) and worlds(output)[-1][1] == count, PATIENCE)

    trained_by(2)
    nodes.kill()
    did.append("a node died")
    trained_by(1)
    nodes.add()
    nodes.add()
    did.append("two nodes came")
    trained_by(3)
    nodes.drain(30)
    wait_until(lambda: "asked to stop" in (output / "progress.log").read_text(), 300)
    did.append("a node drained")
    nodes.kill()
    trained_by(2)
    did.append("two went on")


def losses_alone(config: BaseConfig, *, moved: bool = False) -> NDArray[np.float64]:
    """The losses of every step of one process; `moved`: with one weight of it one rounding larger."""
    task = build_task(config)
    if moved:
        weights = next(p for p in task.module.parameters() if p.dim() == 2 and len(p) == p.shape[1])
        with torch.no_grad():
            weights[0, 0] = torch.nextafter(weights[0, 0], torch.tensor(torch.inf))
    return np.array(losses_of(config, task))


def last_tensors(config: BaseConfig) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    found = checkpoint.newest(Path(config.output))
    assert found is not None
    return found.tensors()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("rows", "exact_rows"),
    [
        ("tokens", "auto"),  # 96 rows: the training magnifies rounding, and so sums must not round
        ("tokens", 2),
        ("new_rows", "auto"),  # each seen once
        ("new_rows", None),  # sums as they come
    ],
)
def test_a_training_shrinks_and_grows_with_its_cluster(
    rows: str,
    exact_rows: int | str | None,
    nodes: Nodes,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ENABLE_PREEMPTION_WATCHER": "1", "PREEMPTION_POLL_INTERVAL_S": "1"}.items():
        monkeypatch.setenv(f"RAY_TRAIN_{name}", value)
    monkeypatch.setattr(stage, "RESIZE_SECONDS", 5)
    read = request.getfixturevalue(rows)
    config = config_of(tmp_path / "elastic", read, exact_rows=exact_rows)
    nodes.add()
    nodes.add()
    did: list[str] = []
    training = threading.Thread(target=stage.train, args=(config, Run.off()), daemon=True)
    training.start()
    change(nodes, Path(config.output), did)  # here, since a node of Ray's takes signals, as the main thread alone may
    training.join(600)
    assert not training.is_alive()
    assert did == ["a node died", "two nodes came", "a node drained", "two went on"]
    assert {count for _, count in worlds(Path(config.output))} == {1, 2, 3}
    torch.set_num_threads(1)  # as a worker has
    once = {"workers": 0, "checkpoint": {"every": STEPS}, "exact_rows": config.exact}
    single, twin = (config_of(tmp_path / name, read, **once) for name in ("alone", "moved"))
    alone, moved = losses_alone(single), losses_alone(twin, moved=True)
    if config.exact is not None:
        ours, wanted = last_tensors(config), last_tensors(single)
        assert ours.keys() == wanted.keys()
        assert [name for name, value in wanted.items() if not torch.equal(ours[name], value)] == []
    felt = np.maximum.accumulate(np.abs(moved - alone))  # what one rounding has become by each step
    before = int(np.argmax(felt > 1e-6)) or STEPS
    assert {count for step, count in worlds(Path(config.output)) if step <= before} == {1, 2, 3}
    for step, _ in worlds(Path(config.output)):
        found, _ = checkpoint.read(checkpoint.folder_of(Path(config.output), step))
        assert found is not None
        since, said = found.state["steps"], f"step {step}, by which one rounding has become {felt[step - 1]:.1e}"
        assert found.state["loss"] == pytest.approx(alone[step - since : step].mean(), abs=1e-5), said
