"""The local Ray that a command runs on, and stages by role on machines with labels."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from processes import alive, wait_until
from raymuse.clusters.placement import ROLE, place
from raymuse.config.errors import UserError

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
    """A process that holds a local Ray."""

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

    def wait(self) -> None:
        """Until it has started, and says what it found."""
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
        while left := alive(self.children):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Working]]:
    """Three at once, since a start is mostly waiting; by what becomes of them."""
    found = {"ends": Working("dashboard"), "is interrupted": Working(), "is killed": Working("dashboard")}
    try:
        yield found
    finally:
        for working in found.values():
            with working.process:
                working.process.kill()


def status(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_private_ray_asks_for_its_token_and_leaves_nothing(started: dict[str, Working]) -> None:
    working = started["ends"]
    working.wait()
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


def test_nothing_stays_behind_after_ctrl_c(started: dict[str, Working]) -> None:
    working = started["is interrupted"]
    working.wait()
    code, _, err = working.finish(interrupt=True)
    assert code != 0
    assert "KeyboardInterrupt" in err
    assert working.leftovers() == []
    assert not working.folder.exists()


def test_nothing_stays_behind_after_sigkill(started: dict[str, Working]) -> None:
    working = started["is killed"]
    working.wait()
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


PLACED = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from raymuse.clusters.placement import ROLE, place

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "labels": {ROLE: "head"}})
for role in sys.argv[1:]:
    nodes.add_node(num_cpus=1, num_gpus=0 if role == "cpu" else 1, labels={ROLE: role})
nodes.wait_for_nodes()
ray.init(address=nodes.address, log_to_driver=False)

@ray.remote
def where():
    return ray.get_runtime_context().get_node_id()

names = {node["NodeID"]: node["Labels"].get(ROLE) for node in ray.nodes()}
found = {}
for work, gpus in {"decode": 0, "encode": 1, "train": 1, "draw": 1, "encode ": 0}.items():
    found[work] = names[ray.get(where.options(num_gpus=gpus, label_selector=place(work.strip(), gpus)).remote())]
print(json.dumps(found))
ray.shutdown()
nodes.shutdown()
"""


def test_work_runs_on_machines_of_its_role() -> None:
    """On a real cluster of several nodes, in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    words = [sys.executable, "-c", PLACED, "trainer", "generator", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "decode": "cpu", "encode": "trainer", "train": "trainer", "draw": "generator", "encode ": "cpu",
    }  # fmt: skip


def test_a_cluster_of_other_people_without_roles_is_used_as_it_is(ray_cluster: Cluster) -> None:
    @ray.remote
    def where() -> str:
        return str(ray.get_runtime_context().get_node_id())

    names = {node["NodeID"]: node["Labels"].get(ROLE) for node in ray.nodes()}
    assert names[ray.get(where.options(num_gpus=0, label_selector=place("decode", 0)).remote())] is None
