"""Debian's Postgres and an MLflow server before it, on ports of their own, as cluster/mlflow.sh starts the server."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from heads import free_ports
from raymuse.tracking.server import answers

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin/"), default=Path("/nowhere"))
START_SECONDS = 300


class Postgres:
    """One that belongs to another user than root, for whom it will not run; it asks for a password."""

    def __init__(self, folder: Path) -> None:
        self.folder, (self.port,), self.password = folder, free_ports(1), secrets.token_hex(16)
        # Debian's package makes this user
        self.owner: dict[str, Any] = (
            {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
        )
        word = folder / "password"
        word.touch(mode=0o600)
        word.write_text(self.password)
        for path in (folder, word) if self.owner else ():
            shutil.chown(path, self.owner["user"], self.owner["group"])
        self.run("initdb", "--auth=scram-sha-256", "--username=raymuse", f"--pwfile={word}")
        word.unlink()

    @property
    def uri(self) -> str:
        return f"postgresql://raymuse:{self.password}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self.run("pg_ctl", "start", "--wait", f"--timeout={START_SECONDS}", f"--log={self.folder}/log", "-o", options)

    def crash(self) -> None:
        """End it without a checkpoint, as a machine's end does: the next start recovers."""
        self.run("pg_ctl", "stop", "--mode=immediate")

    def run(self, program: str, *words: str) -> None:
        """Its commands are for the data's owner, and must not wait for a server that keeps their output open."""
        given: list[Any] = [PROGRAMS / program, f"--pgdata={self.folder}/data", *words]
        clean = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
        with (self.folder / "commands.log").open("a") as log:
            done = subprocess.run(given, **self.owner, env=clean, cwd=self.folder, stdout=log, stderr=log, timeout=400)
        assert done.returncode == 0, (self.folder / "commands.log").read_text()


class Mlflow:
    """`mlflow server` before a data base."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store, (self.port,) = folder, store, free_ports(1)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        variables = {"MLFLOW_BACKEND_STORE_URI": self.store, "MLFLOW_ARTIFACTS_DESTINATION": f"{self.folder}/artifacts"}
        variables |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                env=os.environ | variables,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.port):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def kill(self) -> None:
        """It, and its workers."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running one, in a folder that its user reaches."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        found = Postgres(Path(folder))
        found.start()
        try:
            yield found
        finally:
            with suppress(AssertionError):  # a test may have ended it
                found.crash()
