"""`make soak`: pre-tokenization killed 20 times (driver, workers; SIGKILL) loses, doubles and changes nothing."""

import hashlib
import random
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tiny
from processes import PRETOKENIZE, Job, storm
from raymuse.config.pretokenize import PretokenizeConfig

KILLS, SEED = 20, 4
SHARDS, PICTURES = 60, 240
WORK = ("MapBatches", "MapWorker", "join_part")  # decoding tasks, encoding actors and joins, by their titles


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
        assert Job(PRETOKENIZE, config, home, WORK, written).wait() == 0
        calm = sums(tmp_path / "calm")
        random_moments, killed, runs = random.Random(SEED), [], 0
        while len(killed) < KILLS:
            output = tmp_path / f"stormy-{runs}"
            stormy = config.model_copy(update={"output": str(output)})
            killed += storm(
                lambda stormy=stormy: Job(PRETOKENIZE, stormy, home, WORK, written),  # type: ignore[misc]
                random_moments,
                KILLS - len(killed),
            )
            assert sums(output) == calm
            keys = pq.read_table(output / "tokens", columns=["key"])["key"].to_pylist()
            assert len(keys) == len(set(keys)) == SHARDS * PICTURES
            runs += 1
        print(f"{len(killed)} kills over {runs} runs: { {kind: killed.count(kind) for kind in set(killed)} }")
        assert {"driver", "worker"} <= set(killed)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def written(output: Path) -> object:
    """Chunks that wait to be joined, and parts."""
    return len(list(output.glob("_chunks/*/*.arrow"))), len(list(output.glob("_manifest/part-*.json")))


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of every part."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("tokens", "captions", "rejects")
        for path in sorted(Path(folder, name).glob("*"))
    }
