"""What the Ray tests share: a cluster of two nodes, and tiny data and models.

Nothing here starts before a test asks for it: the tests without Ray never pay for it. Each process of the tests has a
cluster of its own; data and models are made once for all.
"""

import contextlib
import fcntl
import gc
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray._private import auto_init_hook
from ray.cluster_utils import Cluster

import tiny
from heads import QUIET
from raymuse.clusters.local import _reread_authentication
from raymuse.config.data import DataConfig
from raymuse.config.export import ExportConfig
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.sampling import SamplingConfig
from raymuse.serving.deploy import free_port
from raymuse.serving.instance import serves_http, start_http
from raymuse.stages.data import make_data
from raymuse.stages.export import export
from raymuse.stages.pretokenize import pretokenize
from raymuse.stages.train import train
from raymuse.tracking.run import Run

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no cloud takes this machine away: a process less a training
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # it notices that workers are done, or gone, as often as this
    **QUIET,
}

# Where tests start an S3 server, said to the cluster's workers as a person would say it: in the environment.
S3_PORT = free_port("127.0.0.1")
S3_ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    """A head and another node, each with its raylet, that ask for a token; the tests' process is connected to it."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # Ray's socket paths must stay short
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    outside = dict(os.environ)
    os.environ.update(RAY_ENVIRONMENT, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_TMPDIR=str(folder))
    os.environ.update(S3_ENVIRONMENT)
    _reread_authentication()
    cluster = Cluster()
    try:
        # Without its own port it would look for 8265, which another Ray of this machine may have.
        dashboard = {"include_dashboard": False, "dashboard_port": free_port("127.0.0.1")}
        for options in (dashboard, {}):
            cluster.add_node(num_cpus=3, include_log_monitor=False, **options)
        ray.init(address=cluster.address, logging_level="WARNING")
        for name in {"OMP_NUM_THREADS", *S3_ENVIRONMENT} - outside.keys():  # for Ray's processes alone
            os.environ.pop(name)
        torch.set_num_threads(1)  # as in Ray's workers, so that sums agree to the bit
        yield cluster
    finally:
        ours = psutil.Process().children(recursive=True)
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # it reports its own end as failures
        # A thread of Serve's that has not ended would connect to the cluster once more, and keep it from ending: those
        # of handles that nobody holds end as these are collected, and no other thread may connect.
        gc.collect()
        auto_init_hook.enable_auto_connect = False
        ray.shutdown()
        cluster.shutdown()
        for process in ours:
            if process.is_running() and "ray" in process.name():
                process.kill()
        os.environ.clear()
        os.environ.update(outside)
        _reread_authentication()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder under which the shared data and models lie, for all processes of the tests."""
    root = tmp_path_factory.getbasetemp()
    made = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "made"
    made.mkdir(exist_ok=True)
    return made


@contextlib.contextmanager
def _alone(made: Path) -> Iterator[None]:
    """Inside, this process alone makes what is shared: another then finds it finished, as a resumed stage does."""
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shards(ray_cluster: Cluster, made: Path) -> str:
    """The data stage's output: 12 shards of 8 pictures to train on, and 8 held-out pictures with their prompts."""
    with _alone(made):
        return make_data(DataConfig(output=str(made / "data"), train=96, test=8, pictures_per_shard=8), Run.off())


@pytest.fixture(scope="session")
def vqgan(shards: str, made: Path) -> str:
    """A VQGAN that saw three batches."""
    with _alone(made):
        return train(tiny.vqgan_config(made, f"{shards}/train", steps=3, warm_steps=1), Run.off())


@pytest.fixture(scope="session")
def clip(shards: str, made: Path) -> str:
    """A CLIP that saw three batches, with its tokenizer."""
    with _alone(made):
        return train(tiny.clip_config(made, f"{shards}/train", steps=3), Run.off())


@pytest.fixture(scope="session")
def token_config(shards: str, vqgan: str, clip: str, made: Path) -> PretokenizeConfig:
    """The config of the shared token shards: 64 px, with 32 px beside it, in chunks of 4."""
    return PretokenizeConfig(
        input=f"{shards}/train",
        output=str(made / "tokens"),
        vqgan=vqgan,
        text_encoder=clip,
        resolution=64,
        low_resolution=32,
        chunk_size=4,
    )


@pytest.fixture(scope="session")
def tokens(ray_cluster: Cluster, token_config: PretokenizeConfig, made: Path) -> str:
    """Token shards with low-res ids and text states, undisturbed, with one encoder."""
    with _alone(made):
        return pretokenize(token_config, Run.off())


@pytest.fixture(scope="session")
def base_model(tokens: str, vqgan: str, clip: str, made: Path) -> str:
    """The model folder of a base alone, 32 px, that saw three batches."""
    with _alone(made):
        train(tiny.base_config(made, tokens, steps=3, ema_decay=0.9), Run.off())
        return export(_export(made, "base_model", vqgan, clip), Run.off())


@pytest.fixture(scope="session")
def model(base_model: str, tokens: str, vqgan: str, clip: str, made: Path) -> str:
    """The model folder of a cascade: that base, and 64 px after super-resolution."""
    with _alone(made):
        train(tiny.superres_config(made, tokens, steps=3), Run.off())
        return export(_export(made, "model", vqgan, clip, superres=str(made / "superres")), Run.off())


def _export(made: Path, name: str, vqgan: str, clip: str, superres: str | None = None) -> ExportConfig:
    few = SamplingConfig(steps=3, guidance=2.0, temperature=1.0)
    return ExportConfig(
        output=str(made / name),
        vqgan=vqgan,
        text_encoder=clip,
        base=str(made / "base"),
        superres=superres,
        name="tiny",
        base_sampling=few,
        superres_sampling=few,
    )


@pytest.fixture(scope="session")
def http_port(ray_cluster: Cluster) -> int:
    """Where the shared cluster's one Serve listens on loopback; every test that serves asks for it first."""
    port = free_port("127.0.0.1")
    assert not serves_http("127.0.0.1", port)
    start_http("127.0.0.1", port)
    return port
