"""`make soak`: a batch whose driver, replicas, writers and nodes are killed loses, doubles and changes nothing."""

import hashlib
import json
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

import tiny
from processes import Job, storm
from raymuse.config.generate import GenerateConfig
from raymuse.stages.generate import generate
from raymuse.storage.batch_check import check_batch
from raymuse.tracking.run import Run

KILLS, SEED, PROMPTS = 20, 5, 1500
WORK = ("ServeReplica:raymuse-generate", "GeneratorActor", "ray::write_part")  # who draws and writes, by their titles
GENERATE = """
import sys
from raymuse.clusters.local import session
from raymuse.config.generate import GenerateConfig
from raymuse.stages.generate import generate
from raymuse.tracking.run import Run

with session(num_cpus=4, object_store_gib=0.1, dashboard=False):
    generate(GenerateConfig.model_validate_json(sys.argv[1]), Run.off())
"""


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_20_kills_lose_double_and_change_nothing(tmp_path: Path) -> None:
    encoders = tiny.write_encoders(tmp_path / "encoders", tiny.write_shards(tmp_path / "shards"))
    (tmp_path / "prompts.txt").write_text("".join(f"a star number {number}\n" for number in range(PROMPTS)))
    config = GenerateConfig(
        output=str(tmp_path / "calm"),
        model=tiny.write_model(tmp_path / "model", encoders, cascade=True),
        prompts=str(tmp_path / "prompts.txt"),
        pictures_per_part=16,
        batch_size=8,
        steps=12,
    )
    home = Path(tempfile.mkdtemp(prefix="rk-", dir="/tmp"))
    try:
        assert Job(GENERATE, config, home, WORK, written).wait() == 0
        calm = sums(tmp_path / "calm")
        random_moments, killed, runs = random.Random(SEED), [], 0
        while len(killed) < KILLS:
            output = tmp_path / f"stormy-{runs}"
            engine = ("serve", "actors")[runs % 2]
            stormy = config.model_copy(update={"output": str(output), "engine": engine})
            killed += storm(
                lambda stormy=stormy: Job(GENERATE, stormy, home, WORK, written),  # type: ignore[misc]
                random_moments,
                KILLS - len(killed),
            )
            assert sums(output) == calm
            assert check_batch(str(output)).problems == []
            assert pq.read_metadata(output / "manifest.parquet").num_rows == PROMPTS
            runs += 1
        print(f"{len(killed)} kills over {runs} runs: { {kind: killed.count(kind) for kind in set(killed)} }")
        assert {"driver", "worker"} <= set(killed)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["serve", "actors"])
def test_nodes_that_die_lose_double_and_change_nothing(
    engine: str, ray_cluster: Cluster, model: str, http_port: int, tmp_path: Path
) -> None:
    """A replica on each of three nodes; the third is killed as soon as it works, and another one comes."""
    (tmp_path / "prompts.txt").write_text("".join(f"a star number {number}\n" for number in range(600)))
    config = GenerateConfig(
        output=str(tmp_path / "calm"),
        model=model,
        prompts=str(tmp_path / "prompts.txt"),
        pictures_per_part=16,
        batch_size=8,
        steps=24,
        engine=engine,
    )
    generate(config, Run.off())
    killed, output = 0, tmp_path / "stormy"
    wide = {"output": str(output), "replicas": 3, "cpus_per_replica": 2, "in_flight": 3}
    node = ray_cluster.add_node(num_cpus=3, include_log_monitor=False)  # in this thread alone, Ray's own signals ask
    with ThreadPoolExecutor() as pool:
        job = pool.submit(generate, config.model_copy(update=wide), Run.off())
        while not job.done():
            before = written(output)
            while not job.done() and written(output) == before:
                time.sleep(0.2)
            wait([job], timeout=4)  # so that a replica may begin there
            if not job.done():
                ray_cluster.remove_node(node, allow_graceful=False)
                killed += 1
                node = ray_cluster.add_node(num_cpus=3, include_log_monitor=False)
        job.result()
    ray_cluster.remove_node(node)
    print(f"{killed} nodes killed")
    assert killed >= 2
    assert sums(output) == sums(tmp_path / "calm")
    assert check_batch(str(output)).problems == []
    assert json.loads((output / "_SUCCESS").read_text())["rejects"] == 0


def written(output: Path) -> object:
    """Parts."""
    return len(list(output.glob("_manifest/part-*.json")))


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of every part, and of the table of all."""
    files = [path for name in ("parts", "rows") for path in sorted(Path(folder, name).glob("*"))]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*files, folder / "manifest.parquet"]
    }
