"""The whole flow by `ray job submit` on four nodes, which crash and drain under each stage: equal results."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from heads import RAY, ROOT, Head, running_head
from nodes import Node, Nodes, nodes_of, running_nodes
from processes import wait_until

SEED, NOTICE, PATIENCE = 8, 15, 900
# The order of a flow, and where each stage writes.
STAGES = {name: name for name in ("data", "vqgan", "clip", "pretokenize", "base", "superres")}
STAGES |= {"pretokenize": "tokens", "export": "model", "generate": "images", "score": "scores"}
TRAININGS = ("vqgan", "clip", "base", "superres")
# The driver alone works, or somebody for seconds: a node ends as soon as the job runs, one a job.
BRIEF = ("export", "score")
STORMED = os.environ.get("STORMED", ",".join(STAGES)).split(",")  # to look at some again; the others run undisturbed
SCRIPTS = {"data": "make_data", **dict.fromkeys(TRAININGS, "train")}
# Each stage lasts until two of its nodes have gone. A training is a group of two, which is started again each time.
SIZES = ["data.train=4000", "data.test=160", "data.pictures_per_shard=50", "generate.replicas=2"]
SIZES += ["pretokenize.decoders=3", "pretokenize.encoders=2", "pretokenize.chunk_size=10"]
LASTING = ("workers=2", "steps=400", "checkpoint.every=10", "sample_every=200", "log_every=100", "max_failures=2")
SIZES += [f"{section}.{change}" for section in TRAININGS for change in LASTING]
RESULTS = (
    "data/**/*.tar",
    "*/model/**/*.safetensors",
    "tokens/**/*.parquet",
    "model/**/*.safetensors",
    "images/**/*.tar",
)


class Job:
    """One stage under `ray job submit`."""

    def __init__(self, head: Head, section: str, root: Path) -> None:
        self.section, self.output, self.log = section, root / STAGES[section], root / f"{section}.log"
        changes = [size.removeprefix(f"{section}.") for size in SIZES if size.startswith(f"{section}.")]
        script = ["python", f"jobs/{SCRIPTS.get(section, section)}.py", f"smoke:{section}", f"workdir={root}"]
        words = ["--address", head.address, "--working-dir", ".", "--runtime-env", "jobs/env.yaml"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [RAY, "job", "submit", *words, "--", *script, *changes],
                cwd=ROOT,
                env=head.environment,
                stdout=log,
                stderr=log,
            )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def written(self) -> int:
        """How far its committed work is: the newest checkpoint's step, or the number of parts."""
        if self.section in TRAININGS:
            steps = [int(path.parent.name.removeprefix("step-")) for path in self.output.glob("step-*/checkpoint.json")]
            return max(steps, default=0)
        return len(list(self.output.glob("_manifest/*.json")))

    def more_than(self, before: int) -> bool:
        return self.ended or self.written() > before


@pytest.mark.soak
@pytest.mark.timeout(7000)
def test_nodes_crash_and_drain_under_every_stage_and_change_nothing(tmp_path: Path) -> None:
    moments = random.Random(SEED)
    with running_head(num_cpus=0, variables=WATCHES) as head, running_nodes(head, 3, num_cpus=2) as nodes:
        calm, stormy = tmp_path / "calm", tmp_path / "stormy"
        for root in (calm, stormy):
            root.mkdir()
        for section in STAGES:
            began = time.monotonic()
            finish(Job(head, section, calm))
            middle = time.monotonic()
            if section not in STORMED:
                shutil.copytree(calm / STAGES[section], stormy / STAGES[section])
                continue
            for ends in [["crash"], ["drain"]] if section in BRIEF else [["crash", "drain"]]:
                shutil.rmtree(stormy / STAGES[section], ignore_errors=True)
                job = Job(head, section, stormy)
                for end in ends:
                    assert ends_a_node(nodes, job, end, moments), f"{section} ended before a node's {end}"
                finish(job)
                assert sums(stormy, section) == sums(calm, section), section
            print(f"{section}: {middle - began:.0f} s undisturbed, {time.monotonic() - middle:.0f} s", flush=True)
            assert len(nodes_of(head)) == 3
        assert [scores(root) for root in (stormy, calm)] == [scores(calm)] * 2


# A worker of Ray Train hears of its node's notice within a second.
WATCHES = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}


def finish(job: Job) -> None:
    code = job.process.wait(PATIENCE)
    assert code == 0, job.log.read_text()[-6000:]


def ends_a_node(nodes: Nodes, job: Job, end: str, moments: random.Random) -> bool:
    """End a node that works for the job, and start another in its place; False where the job ended first."""
    if job.section in BRIEF:
        wait_until(lambda: job.ended or "Tailing logs" in job.log.read_text(), PATIENCE, pause=0.1)
    else:
        before = job.written()
        wait_until(lambda: job.more_than(before), PATIENCE, pause=0.02)
    if job.ended:
        return False
    found = nodes_of(nodes.head)
    victim = moments.choice([node for node in found if node.titles()] or found)
    if end == "drain":
        victim.drain(nodes.head, NOTICE)
        leaves(victim, NOTICE)
    victim.crash()
    nodes.add()
    return True


def leaves(node: Node, seconds: float) -> None:
    """What a cloud does: the machine goes when its notice is over, or nothing works there any more."""
    until = time.monotonic() + seconds
    while node.titles() and time.monotonic() < until:
        time.sleep(0.2)


def sums(root: Path, section: str) -> dict[str, str]:
    """Of the files that a stage is there to write."""
    paths = [path for pattern in RESULTS for path in root.glob(pattern)]
    mine = [path for path in paths if path.relative_to(root).parts[0] == STAGES[section]]
    assert mine or section == "score"
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in mine}


def scores(root: Path) -> object:
    return json.loads((root / "scores" / "scores.json").read_text())
