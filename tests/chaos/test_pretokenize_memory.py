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

PICTURES, SIDE = 1500, 128  # two shards of so many do not fit the object store: decoding waits for encoding in both
STORE_GIB = 0.1  # of PRETOKENIZE


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_is_flat_from_2_to_20_shards(tmp_path: Path) -> None:
    first = tiny.write_shards(tmp_path / "few", count=2 * PICTURES, per_shard=PICTURES, side=SIDE)
    encoders = tiny.write_encoders(tmp_path / "encoders", first)
    many = Path(shutil.copytree(first, tmp_path / "many"))
    for number in range(2, 20):  # other shards of the same pictures: the memory cannot tell
        shutil.copy(many / "00000.tar", many / f"{number:05d}.tar")
    few = peak_gib(config_of(first, encoders, tmp_path / "out-few"))
    twenty = peak_gib(config_of(str(many), encoders, tmp_path / "out-many"))
    shard = PICTURES * SIDE * SIDE * 3 / 2**30
    moved = 20 * shard
    print(f"peak of 2 shards {few:.2f} GiB, of 20 shards {twenty:.2f} GiB; {moved:.2f} GiB of crops went through")
    assert 2 * shard > STORE_GIB, "the crops of the small run would fit into it: its decoding would wait for nobody"
    assert moved > 3 * STORE_GIB, "the crops would fit into the object store: nothing would be shown"
    assert twenty < few + 0.15


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
