"""Nodes beside a head of the tests (`heads.py`): made by `ray start`, ended as machines are, with notice or without."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from heads import PATIENT_RAY, RAY, Head, free_ports
from processes import kill_family

PATIENCE = 300
# Workers of Ray's own, and those that wait for work; a worker's title says what it does.
NO_WORK = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "JobSupervisor", "SPILL", "RESTORE")


class Node:
    """One machine of a cluster: a raylet, and all that it started."""

    def __init__(self, raylet: psutil.Process) -> None:
        self.raylet = raylet
        words = dict(word.partition("=")[::2] for word in raylet.cmdline())
        self.id, self.is_head = words["--node_id"], "--head" in words

    def titles(self) -> list[str]:
        """What its workers do, such as `ray::RayTrainWorker`."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for process in self.raylet.children():
                with suppress(psutil.Error):
                    title = " ".join(process.cmdline()).strip()
                    if title.startswith("ray::") and not title.removeprefix("ray::").startswith(NO_WORK):
                        found.append(title)
        return found

    def crash(self) -> None:
        """All of its processes at once, without notice."""
        kill_family(self.raylet)

    def drain(self, head: Head, seconds: int) -> None:
        """A cloud's notice that the machine goes."""
        words = ["--address", head.gcs, "--node-id", self.id, "--deadline-remaining-seconds", str(seconds)]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([RAY, "drain-node", *words, *reason], env=head.environment, check=True, timeout=PATIENCE)


def nodes_of(head: Head) -> list[Node]:
    """The head's living nodes but itself."""
    found, temporary = [], f"--temp_dir={head.folder}"
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "raylet" and any(word.startswith(temporary) for word in process.cmdline()):
                found.append(Node(process))
    return [node for node in found if not node.is_head]


class Nodes:
    """Machines that join and leave; each has an address of its own of this machine's loopback, and a folder of its own.

    In a common one a node that joins would unpack a job's working folder anew, under all who stand in it.
    """

    def __init__(self, head: Head, num_cpus: int) -> None:
        self.head, self.num_cpus, self.made = head, num_cpus, 0

    def add(self) -> None:
        """Start one, and return when the head knows it."""
        wanted = len(nodes_of(self.head)) + 1
        self.made += 1
        agent, inner, metrics, environments = free_ports(4)
        words = ["start", f"--address={self.head.gcs}", f"--node-ip-address=127.0.0.{self.made + 1}"]
        words += [
            f"--num-cpus={self.num_cpus}",
            "--object-store-memory=100000000",
            f"--temp-dir={self.head.folder}/{self.made}",
        ]
        words += ["--min-worker-port=0", "--max-worker-port=0", f"--metrics-export-port={metrics}"]
        words += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={inner}"]
        words += [f"--runtime-env-agent-port={environments}"]
        with (self.head.folder / f"node-{self.made}.log").open("w") as log:
            done = subprocess.run(
                [*PATIENT_RAY, *words],
                env=self.head.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=PATIENCE,
            )
        assert done.returncode == 0, (self.head.folder / f"node-{self.made}.log").read_text()
        until = time.monotonic() + PATIENCE  # of a node that crashed the head hears late
        while len(self.head.nodes("ALIVE")) != wanted:
            assert time.monotonic() < until, self.head.nodes("ALIVE")
            time.sleep(0.5)

    def end(self) -> None:
        """Of a node's log monitor its raylet is no parent; it, too, names the head's folder."""
        for node in nodes_of(self.head):
            node.crash()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if "log_monitor.py" in words and f"{self.head.folder}/" in words:
                    process.kill()


@contextmanager
def running_nodes(head: Head, count: int, num_cpus: int) -> Iterator[Nodes]:
    """Nodes beside a head; ended with all of their processes."""
    nodes = Nodes(head, num_cpus)
    try:
        for _ in range(count):
            nodes.add()
        yield nodes
    finally:
        nodes.end()
