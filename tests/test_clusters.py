"""The local Ray that a command runs on, and stages by role on machines with labels."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from processes import wait_until
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
