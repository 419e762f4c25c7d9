"""Cluster files against Ray's and KubeRay's own schemas, and the local Ray that a command runs on."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from processes import wait_until
from raymuse.clusters.check import check
from raymuse.config.errors import UserError

ROOT = Path(__file__).parents[1]
AWS = ROOT / "cluster" / "aws.yaml"
KUBERAY = ROOT / "cluster" / "kuberay" / "raycluster.yaml"


def changed(source: Path, folder: Path, *replacements: tuple[str, str]) -> Path:
    text = source.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = folder / "changed.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.yaml")), ids=lambda path: path.name)
def test_our_cluster_files_are_right(path: Path) -> None:
    assert check(path) == []


def test_a_launcher_file_is_told_all_its_errors(tmp_path: Path) -> None:
    path = changed(AWS, tmp_path, ("max_workers: 16", "max_worker: 16"), ("ssh_user: ubuntu", "ssh_user: 3"))
    assert check(path) == [
        "auth.ssh_user: 3 is not of type 'string'",
        "available_node_types.decoders.max_worker: no such key; did you mean max_workers?",
    ]


def test_rays_own_rules_are_asked_too(tmp_path: Path) -> None:
    (problem,) = check(changed(AWS, tmp_path, ("head_node_type: head", "head_node_type: hed")))
    assert "must be one of `available_node_types`" in problem
    (problem,) = check(changed(AWS, tmp_path, ("min_workers: 0\n    max_workers: 16", "min_workers: 99")))
    assert "smaller than the sum of `min_workers`" in problem


def test_a_kuberay_file_is_told_all_its_errors(tmp_path: Path) -> None:
    path = changed(KUBERAY, tmp_path, ("mode: token", "mode: tokn"), ("maxReplicas: 8", "maxReplica: 8"))
    found = check(path)
    assert "RayCluster raymuse: spec.authOptions.mode: 'tokn' is not one of ['disabled', 'token']" in found
    assert "RayCluster raymuse: spec.workerGroupSpecs.1.maxReplica: no such key; did you mean maxReplicas?" in found


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_every_kind_that_holds_a_cluster_is_known(kind: str, tmp_path: Path) -> None:
    spec = yaml.safe_load(KUBERAY.read_text())["spec"]
    key = "rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"
    document: dict[str, Any] = {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": "x"}, "spec": {key: spec}}
    path = tmp_path / "it.yaml"
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "not ours to check"}}
    path.write_text(yaml.safe_dump_all([other, document]))
    assert check(path) == []
    document["spec"]["entrypont"] = "python x.py"
    path.write_text(yaml.safe_dump_all([other, document]))
    assert check(path)[0].startswith(f"{kind} x: spec.entrypont: no such key")


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1", "is no cluster file"), ("a: [", "is not YAML"), ("", "is no cluster file"), ("- 1", "is no cluster")],
)
def test_what_is_no_cluster_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        check(path)
    with pytest.raises(UserError, match="cannot read"):
        check(tmp_path / "none.yaml")


WORK = """
import json, os, sys, time
import ray
from raymuse.clusters.local import session

@ray.remote
def environment():
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAY_AUTH_MODE", "DS_ACCELERATOR")}

before = dict(os.environ)  # after Ray's import, which sets a variable too
with session(num_cpus=2, object_store_gib=0.1, dashboard="dashboard" in sys.argv) as cluster:
    with session() as inner:  # joins what is there, and leaves it
        assert not inner.ours
    assert ray.is_initialized()
    facts = {
        "dashboard": cluster.dashboard, "token": str(cluster.token), "mode": oct(cluster.token.stat().st_mode & 0o777),
        "workers": ray.get(environment.remote()), "driver_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()
assert not ray.is_initialized()
assert dict(os.environ) == before
print("ended", flush=True)
"""


class Working:
    """A process that holds a local Ray, with what it says of it."""

    def __init__(self, *words: str) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "OMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=clean,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.facts = json.loads(line)
        self.folder = Path(self.facts["token"]).parent
        self.children = psutil.Process(self.process.pid).children(recursive=True)

    def finish(self, interrupt: bool) -> tuple[int, str, str]:
        if interrupt:
            os.killpg(self.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does: all of the group gets it
        out, err = self.process.communicate(None if interrupt else "\n", timeout=60)
        return self.process.returncode, out, err

    def leftovers(self) -> list[psutil.Process]:
        deadline = time.monotonic() + 5
        while left := [child for child in self.children if child.is_running()]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left


def status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_private_ray_asks_for_its_token_and_leaves_nothing() -> None:
    working = Working("dashboard")
    assert len(working.children) > 3
    assert working.facts["mode"] == "0o600"
    assert working.facts["workers"]["RAY_AUTH_MODE"] == "token"
    assert working.facts["workers"]["OMP_NUM_THREADS"] == "1"
    assert working.facts["driver_threads"] is None
    url, token = f"http://{working.facts['dashboard']}/api/version", Path(working.facts["token"]).read_text()
    assert [status(url, None), status(url, "wrong"), status(url, token)] == [401, 403, 200]
    code, out, err = working.finish(interrupt=False)
    assert (code, out.strip()) == (0, "ended"), err
    assert working.leftovers() == []
    assert not working.folder.exists()


def test_nothing_stays_behind_after_ctrl_c() -> None:
    working = Working()
    code, _, err = working.finish(interrupt=True)
    assert code != 0
    assert "KeyboardInterrupt" in err
    assert working.leftovers() == []
    assert not working.folder.exists()


def test_nothing_stays_behind_after_sigkill() -> None:
    working = Working("dashboard")
    working.process.kill()
    working.process.communicate(timeout=60)
    assert working.leftovers() == []
    wait_until(lambda: not working.folder.exists(), 10)


@pytest.mark.parametrize(
    ("address", "said"),
    [("http://127.0.0.1:8265", "address of a job server"), ("127.0.0.1:1", "no Ray cluster answers")],
)
def test_a_ray_address_that_cannot_be_joined(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from raymuse.clusters.local import session

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # a test before may have left the shared cluster joined
    with pytest.raises(UserError, match=said), session():
        pass
