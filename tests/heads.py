"""A Ray head of the tests' own, as `ray start` makes one, that asks for a token and takes jobs."""

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray.util import get_node_ip_address

from processes import kill_family

Grows = Callable[[str, Path], tuple[list[str], dict[str, str]]]

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
PATIENT_RAY = (sys.executable, str(Path(__file__).with_name("patient_ray.py")))
# Watching every process, which agents do every five seconds, would take a tenth of a small machine; and a test needs
# few workers, where Ray starts one a core.
QUIET = {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_prestart_worker_first_driver": "0",
}
PORTS = range(20000, 32768)  # above those that Ray gives to workers, below those that the kernel gives


@dataclass(frozen=True)
class Head:
    """A cluster's address, and the environment in which clients may talk to it."""

    address: str
    token: str
    environment: dict[str, str]
    folder: Path
    metrics_port: int
    gcs: str

    def nodes(self, state: str) -> list[dict[str, float]]:
        """Resources of the nodes that are ALIVE, or DEAD by now, but of the head."""
        request = urllib.request.Request(f"{self.address}/api/v0/nodes?detail=1")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=20) as response:
            found = json.load(response)["data"]["result"]["result"]
        return [node["resources_total"] for node in found if node["state"] == state and not node["is_head_node"]]

    def metrics(self) -> str:
        """What Prometheus reads of the head's node."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=20) as response:
            return str(response.read().decode())

    def submit(self, submission: str, *command: str, packaged: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as a job, and return when it has ended.

        Args:
            packaged: send the checkout along; else the job runs by the one that is here.
        """
        words = ["job", "submit", "--address", self.address, "--submission-id", submission]
        here = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT / "platform")}})
        sent = ["--working-dir", ".", "--runtime-env", "jobs/env.yaml"]
        words += [*(sent if packaged else ["--runtime-env-json", here]), "--", *command]
        while True:
            done = subprocess.run(
                [RAY, *words], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=600
            )
            if "No available agent to submit job" not in done.stderr:
                return done
            time.sleep(1)  # the agent listens, and has not told the head so

    def exit_code(self, submission: str) -> int:
        """What the job's driver ended with; `ray job submit` itself knows only 0 and 1."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{submission}")
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(json.load(response)["driver_exit_code"])


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, and that nobody is given who asks for any: Ray's workers, or who binds to 0."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"no {count} of {PORTS} are free")


@contextmanager
def running_head(
    num_cpus: int = 4, grows: Grows | None = None, variables: dict[str, str] | None = None
) -> Iterator[Head]:
    """A head of one node on free ports; ended with all of its processes.

    Args:
        variables: of the environment of all that runs there.
        grows: takes the address of the cluster and its folder; gives further words and environment of `ray start`.
    """
    with tempfile.TemporaryDirectory(prefix="rm-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = secrets.token_hex(32)
        path = Path(folder) / "token"
        path.touch(mode=0o600)
        path.write_text(token)
        gcs, dashboard, agent, client, metrics, inner, environments = free_ports(7)
        more, own = grows(f"{get_node_ip_address()}:{gcs}", Path(folder)) if grows else ([], {})
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = clean | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(path),
            "RAY_USAGE_STATS_ENABLED": "0",
            **QUIET,
            "RAY_worker_niceness": "0",  # or they would give way to every other process of the tests
            "RAY_raylet_start_wait_time_s": "300",  # whatever else the machine does
            "RAY_agent_register_timeout_ms": "300000",
            "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # for `python` in the jobs' command
            **own,
            **(variables or {}),
        }
        words = ["--head", "--block", f"--num-cpus={num_cpus}", f"--temp-dir={folder}", *more]
        words += ["--object-store-memory=200000000", f"--metrics-export-port={metrics}"]
        words += [f"--port={gcs}", f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1"]
        words += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        words += [f"--dashboard-agent-grpc-port={inner}", f"--runtime-env-agent-port={environments}"]
        log = Path(folder) / "head.log"
        with log.open("w") as out:
            process = subprocess.Popen(
                [*PATIENT_RAY, "start", *words], env=environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            at = f"{get_node_ip_address()}:{gcs}"
            found = Head(f"http://127.0.0.1:{dashboard}", token, environment, Path(folder), metrics, at)
            wait_until_it_takes_jobs(found, agent, process, log)
            yield found
        finally:
            # Asked to end, Ray waits longer for its own processes than anybody here would.
            with suppress(psutil.NoSuchProcess):
                kill_family(psutil.Process(process.pid))
            process.wait()


def wait_until_it_takes_jobs(head: Head, agent: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the dashboard answers, and the agent that it hands jobs to."""
    request = urllib.request.Request(f"{head.address}/api/jobs/")
    request.add_header("Authorization", f"Bearer {head.token}")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), urllib.request.urlopen(request, timeout=60):
            socket.create_connection((get_node_ip_address(), agent), timeout=60).close()
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())
