"""Through Ray Train with DeepSpeed on two nodes: 40 steps straight, and 20, a loss, and 20 more, have the same bits."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from heads import ROOT, Head, running_head
from nodes import Nodes, nodes_of, running_nodes
from processes import wait_until
from raymuse.storage import checkpoint

STEPS, HALF, PATIENCE = 40, 20, 900
SHAPE = {**tiny.UVIT, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 1024}  # ZeRO-3 shards it
WORKER = "ray::RayTrainWorker"


@dataclass(frozen=True)
class Place:
    """Two nodes of a core each, and a base's token shards."""

    head: Head
    nodes: Nodes
    tokens: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("place")
    shards = tiny.write_shards(root / "shards")
    tokens = tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root / "encoders", shards))
    with running_head(num_cpus=0) as head, running_nodes(head, 2, num_cpus=1) as nodes:
        yield Place(head, nodes, tokens)


class Training:
    """One training under `ray job submit`: a worker a node, a checkpoint half way and one at the end."""

    def __init__(self, place: Place, root: Path, name: str, stage: int) -> None:
        self.place, self.output = place, root / name / "base"
        values: dict[str, Any] = {
            "ids": "image_ids",
            "steps": STEPS,
            "model": SHAPE,
            "ema_decay": 0.9,
            "batch_size": 16,
        }
        values |= {"workers": 2, "zero": {"stage": stage}, "max_failures": 2, "log_every": 1}
        kept = {"every": HALF, "keep": 2}
        config = tiny.base_config(root / name, place.tokens, checkpoint=kept, **values)
        recipe = root / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        command = ["python", str(ROOT / "jobs" / "train.py"), str(recipe)]
        self.pool = ThreadPoolExecutor(1)
        self.job: Future[Any] = self.pool.submit(place.head.submit, f"{name}-{stage}", *command, packaged=False)

    def half_way(self) -> None:
        """Return as soon as the checkpoint half way counts; the end must be ahead."""
        there = checkpoint.folder_of(self.output, HALF) / "checkpoint.json"
        wait_until(lambda: there.exists() or self.job.done(), PATIENCE)
        assert not self.job.done(), self.said()

    def finish(self) -> checkpoint.Checkpoint:
        """Wait for the end, and read the checkpoint there."""
        assert self.job.result(PATIENCE).returncode == 0, self.said()
        self.pool.shutdown()
        found, problem = checkpoint.read(checkpoint.folder_of(self.output, STEPS))
        assert found is not None, problem
        assert len(found.files) == 2  # a share a worker
        return found

    def resumed(self) -> list[str]:
        lines = (self.output / "progress.log").read_text().splitlines()
        return [line.split()[4] for line in lines if line.startswith("going on from step")]

    def said(self) -> str:
        done = self.job.result(PATIENCE)
        return str(done.stdout[-3000:] + done.stderr[-3000:])

    def models(self) -> list[bytes]:
        names = ("model", "model_raw")
        return [(self.output / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in names]


def kill_a_worker(place: Place) -> None:
    (worker,) = [
        process for process in nodes_of(place.head)[1].raylet.children() if WORKER in " ".join(process.cmdline())
    ]
    worker.kill()


def kill_a_node(place: Place) -> None:
    """With all of its processes; another takes its place."""
    victim = nodes_of(place.head)[1]
    assert any(title.startswith(WORKER) for title in victim.titles())
    victim.crash()
    place.nodes.add()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_lost_worker_and_a_lost_node_change_no_bit(stage: int, place: Place, tmp_path: Path) -> None:
    straight = Training(place, tmp_path, "straight", stage)
    wanted = straight.finish().tensors()
    assert straight.resumed() == []
    assert {name.split("/")[0] for name in wanted} == {"weight", "ema", "exp_avg", "exp_avg_sq"}
    for name, kill in {"worker": kill_a_worker, "node": kill_a_node}.items():
        broken = Training(place, tmp_path, name, stage)
        broken.half_way()
        kill(place)
        tensors = broken.finish().tensors()
        assert broken.resumed() == [str(HALF)], name
        assert tensors.keys() == wanted.keys()
        assert [key for key, value in wanted.items() if not tensors[key].equal(value)] == [], name
        assert broken.models() == straight.models(), name
