"""`make soak`: the smoke flow killed (SIGKILL, no clean-up) at random moments still comes to its end, exactly once."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

KILLS = 8
SEED = 20


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_flow_killed_at_random_moments_ends_with_every_part_once(tmp_path: Path) -> None:
    moments = random.Random(SEED)
    for kill in range(KILLS):
        run_for(tmp_path, moments.uniform(10, 60))
        print(f"kill {kill + 1}: finished so far {finished_stages(tmp_path)}")
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(finished_stages(tmp_path)) == 9
    prompts = (tmp_path / "work" / "data" / "prompts.jsonl").read_text().splitlines()
    keys = pq.read_table(tmp_path / "work" / "images" / "manifest.parquet")["key"].to_pylist()
    assert sorted(set(keys)) == sorted(keys)
    assert len(keys) == len(prompts)
    tokens = pq.read_table(tmp_path / "work" / "tokens" / "tokens")["key"].to_pylist()
    assert len(set(tokens)) == len(tokens) == 256


def command(root: Path) -> list[str]:
    return [sys.executable, "-m", "raymuse.cli", "demo", "--recipe", "smoke", f"workdir={root / 'work'}"]


def run_for(root: Path, seconds: float) -> None:
    """Start the flow, kill its driver after a while, and wait until all that it started is gone too."""
    with (root / "log").open("a") as log:
        running = psutil.Popen(command(root), stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        family: list[psutil.Process] = []
        while time.monotonic() < deadline and running.poll() is None:
            family = running.children(recursive=True) or family
            time.sleep(0.2)
        running.kill()
        running.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [process.cmdline() for process in alive] == []


def finished_stages(root: Path) -> list[str]:
    outputs = [path.parent.name for path in (root / "work").glob("*/_SUCCESS")]
    return sorted(name for name in outputs if json.loads((root / "work" / name / "_SUCCESS").read_text()) is not None)
