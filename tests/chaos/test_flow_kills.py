"""`make soak`: the smoke flow killed (SIGKILL, no clean-up) at random moments still comes to its end, exactly once."""

import contextlib
import json
import random
import signal
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
    kills = flows = 0
    while kills < KILLS:  # a flow that comes to its end between two kills is followed by another
        root = tmp_path / f"flow-{flows}"
        root.mkdir()
        while kills < KILLS and is_killed(root, moments.uniform(10, 60)):
            kills += 1
            print(f"kill {kills} in flow {flows}: finished so far {finished_stages(root)}")
        check_finished(root)
        flows += 1


def check_finished(root: Path) -> None:
    """Run a flow to its end, and find each picture and each row of tokens once."""
    done = subprocess.run(command(root), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(finished_stages(root)) == 9
    prompts = (root / "work" / "data" / "prompts.jsonl").read_text().splitlines()
    keys = pq.read_table(root / "work" / "images" / "manifest.parquet")["key"].to_pylist()
    assert sorted(set(keys)) == sorted(keys)
    assert len(keys) == len(prompts)
    tokens = pq.read_table(root / "work" / "tokens" / "tokens")["key"].to_pylist()
    assert len(set(tokens)) == len(tokens) == 256


def command(root: Path) -> list[str]:
    return [sys.executable, "-m", "raymuse.cli", "demo", "--recipe", "smoke", f"workdir={root / 'work'}"]


def is_killed(root: Path, seconds: float) -> bool:
    """Start the flow, kill its driver after a while, and wait until all that it started is gone too.

    False where the flow came to its end before.
    """
    with (root / "log").open("a") as log:
        running = subprocess.Popen(command(root), stdout=log, stderr=log)
        deadline = time.monotonic() + seconds
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            while time.monotonic() < deadline and running.poll() is None:
                family = psutil.Process(running.pid).children(recursive=True) or family
                time.sleep(0.2)
        running.kill()
        code = running.wait()
    assert code in (0, -signal.SIGKILL), (root / "log").read_text()[-4000:]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [process.cmdline() for process in alive] == []
    return code != 0


def finished_stages(root: Path) -> list[str]:
    outputs = [path.parent.name for path in (root / "work").glob("*/_SUCCESS")]
    return sorted(name for name in outputs if json.loads((root / "work" / name / "_SUCCESS").read_text()) is not None)
