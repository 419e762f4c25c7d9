"""`make soak`: pre-tokenization killed 20 times (driver, workers; SIGKILL) loses, doubles and changes nothing."""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

import tiny
from processes import PRETOKENIZE, alive, wait_until
from raymuse.clusters.guard import marked
from raymuse.config.pretokenize import PretokenizeConfig

KILLS, SEED = 20, 4
SHARDS, PICTURES = 60, 240
WORK = ("MapBatches", "MapWorker", "join_part")  # in the titles of Ray's workers


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_20_kills_lose_double_and_change_nothing(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards", count=SHARDS * PICTURES, per_shard=PICTURES)
    encoders = tiny.write_encoders(tmp_path / "encoders", shards)
    config = PretokenizeConfig(
        input=shards,
        output=str(tmp_path / "calm"),
        vqgan=encoders,
        text_encoder=encoders,
        resolution=tiny.SIDE,
        low_resolution=tiny.LOW_SIDE,
        crop="random",
        chunk_size=16,
        encoders=2,
        decoders=2,
    )
    home = Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp"))
    try:
        assert Job(config, home).wait() == 0
        calm = sums(tmp_path / "calm")
        random_moments, killed, runs = random.Random(SEED), [], 0
        while len(killed) < KILLS:
            output = tmp_path / f"stormy-{runs}"
            killed += storm(
                config.model_copy(update={"output": str(output)}), home, random_moments, KILLS - len(killed)
            )
            assert sums(output) == calm
            keys = pq.read_table(output / "tokens", columns=["key"])["key"].to_pylist()
            assert len(keys) == len(set(keys)) == SHARDS * PICTURES
            runs += 1
        print(f"{len(killed)} kills over {runs} runs: { {kind: killed.count(kind) for kind in set(killed)} }")
        assert {"driver", "worker"} <= set(killed)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def storm(config: PretokenizeConfig, home: Path, moments: random.Random, most: int) -> list[str]:
    """Run to the end, killing at random moments on the way; what was killed."""
    killed: list[str] = []
    job = Job(config, home)
    while len(killed) < most:
        if not job.works_for(moments.uniform(0.0, 3.0)):
            break
        if moments.random() < 0.35:
            job.kill()
            killed.append("driver")
            job = Job(config, home)
        elif worker := job.some_worker(moments):
            worker.kill()
            killed.append("worker")
    assert job.wait() == 0
    return killed


class Job:
    """One driver process with a Ray of its own."""

    def __init__(self, config: PretokenizeConfig, home: Path) -> None:
        self.home, self.output = home, Path(config.output)
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRETOKENIZE, config.model_dump_json()],
            env=outside | {"TMPDIR": str(home)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def works_for(self, seconds: float) -> bool:
        """Wait until something more is written, and then for a while; False where the job ended first."""
        before = self._written()
        wait_until(lambda: self._written() != before or self.process.poll() is not None, 120)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is None

    def _written(self) -> tuple[int, int]:
        """Chunks that wait to be joined, and parts."""
        return len(list(self.output.glob("_chunks/*/*.arrow"))), len(list(self.output.glob("_manifest/part-*.json")))

    def workers(self) -> list[psutil.Process]:
        """Decoding tasks, encoding actors and joins that run now."""
        found = []
        for ray in self.home.glob("raymuse-*"):
            for process in marked(ray):
                try:
                    title = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                if title.startswith("ray::") and any(
                    name in title for name in ("MapBatches", "MapWorker", "join_part")
                ):
                    found.append(process)
        return found

    def some_worker(self, moments: random.Random) -> psutil.Process | None:
        workers = sorted(self.workers(), key=lambda process: process.pid)
        return moments.choice(workers) if workers else None

    def kill(self) -> None:
        """SIGKILL the driver, and wait until its Ray has gone after it."""
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not self._left(), 60)

    def wait(self) -> int:
        return self.process.wait(timeout=600)

    def _left(self) -> list[psutil.Process]:
        return alive(process for ray in self.home.glob("raymuse-*") for process in marked(ray))


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of every part."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("tokens", "captions", "rejects")
        for path in sorted(Path(folder, name).glob("*"))
    }
