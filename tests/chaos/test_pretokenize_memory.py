"""`make soak`: pre-tokenizing twenty times as much takes no more memory."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

import tiny
from processes import PRETOKENIZE
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.flow import tree_gib

PICTURES, SIDE = 500, 128


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_is_flat_from_7_to_20_shards(tmp_path: Path) -> None:
    """Seven fill the object store, so that every worker and every buffer that there will be is there."""
    first = tiny.write_shards(tmp_path / "one", count=PICTURES, per_shard=PICTURES, side=SIDE)
    encoders = tiny.write_encoders(tmp_path / "encoders", first)
    peaks = {}
    for count in (1, 7, 20):
        shards = tmp_path / f"shards-{count}"
        shards.mkdir()
        for number in range(count):  # the same pictures again: the memory cannot tell
            shutil.copy(f"{first}/00000.tar", shards / f"{number:05d}.tar")
        peaks[count] = peak_gib(config_of(str(shards), encoders, tmp_path / f"out-{count}"))
        moved = count * PICTURES * SIDE * SIDE * 3 / 2**30
        print(f"{count} shards: peak {peaks[count]:.2f} GiB, {moved:.2f} GiB of crops went through")
    assert moved > 3 * 0.1, "the crops would fit into the object store: nothing would be shown"
    assert peaks[20] < peaks[7] + 0.15


def config_of(shards: str, encoders: str, output: Path) -> PretokenizeConfig:
    return PretokenizeConfig(
        input=shards, output=str(output), vqgan=encoders, text_encoder=encoders, resolution=SIDE, decoders=2
    )


def peak_gib(config: PretokenizeConfig) -> float:
    """Highest proportional set size of the driver and its whole Ray, object store included."""
    home = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    try:
        driver = psutil.Popen(
            [sys.executable, "-c", PRETOKENIZE, config.model_dump_json()],
            env=outside | {"TMPDIR": str(home)},
            stdout=subprocess.DEVNULL,
        )
        peak = 0.0
        while driver.poll() is None:
            peak = max(peak, tree_gib(driver))
            time.sleep(0.5)
        assert driver.returncode == 0
        return peak
    finally:
        shutil.rmtree(home, ignore_errors=True)
