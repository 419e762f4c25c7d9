"""A local MLflow server: on the loopback interface, its records in one folder, gone with whoever started it."""

import contextlib
import fcntl
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from raymuse.config.errors import UserError

HOST = "127.0.0.1"
START_SECONDS = 120.0
STOP_SECONDS = 10.0
GUARD = Path(__file__).with_name("guard.py")


class Server:
    """A running MLflow server. Made by `Server.start`; a context manager that stops it on the way out.

    Attributes:
        folder: holds `mlflow.db`, `artifacts/`, `server.log` and `server.json` (what is running, and the last port).
        port: on 127.0.0.1.
        owned: whether this process started it. One that was joined is left running by `stop`.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        pid: int,
        process: "subprocess.Popen[bytes] | None",
        held: socket.socket | None = None,
    ) -> None:
        self.folder, self.port = folder, port
        self._pid, self._process, self._held = pid, process, held

    @classmethod
    def start(
        cls, folder: Path, port: int | None = None, *, wait: bool = True, timeout: float = START_SECONDS
    ) -> "Server":
        """Starts the server of a folder, or joins the one that already runs there: sqlite wants a single process.

        Args:
            folder: created when missing.
            port: `None` takes the last one again where it is free, so that addresses in old notes still work.
            wait: `False` returns at once (starting takes about 10 seconds); call `wait` before the first use.
            timeout: seconds to wait for.

        Raises:
            UserError: the port is taken, or the server did not come up; it ends with the tail of the log.
        """
        folder = folder.expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            server = _join(folder, port) or _launch(folder, _hold_port(folder, port))
        if wait:
            server.wait(timeout)
        return server

    @property
    def uri(self) -> str:
        """What MLflow clients and browsers open."""
        return f"http://{HOST}:{self.port}"

    @property
    def owned(self) -> bool:
        return self._process is not None

    def wait(self, timeout: float = START_SECONDS) -> None:
        """Returns when the server answers.

        Raises:
            UserError: it ended, or did not answer in time; what was started is stopped.
        """
        limit = time.monotonic() + timeout
        while not answers(self.port):
            if not self.alive():
                self._give_up("ended before it answered")
            if time.monotonic() > limit:
                self._give_up(f"did not answer within {timeout:.0f} seconds")
            time.sleep(0.1)
        self._let_go()

    def alive(self) -> bool:
        """Whether its process runs (it may not answer yet)."""
        if self._process is not None:
            return self._process.poll() is None
        return _is_ours(self._pid, self.folder)

    def stop(self) -> None:
        """Ends the process, if this process started it: asks, then kills; may be called twice."""
        self._let_go()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def serve_forever(self) -> None:
        """Blocks until the server ends or Ctrl-C; for `raymuse ui`."""
        try:
            while self.alive():
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _let_go(self) -> None:
        """Of the port, once the server listens on it."""
        if self._held is not None:
            self._held.close()

    def _give_up(self, what: str) -> None:
        self.stop()
        log = self.folder / "server.log"
        tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
        lines = "\n".join(f"  {line}" for line in tail)
        raise UserError(f"The MLflow server of {self.folder} {what}. The end of {log}:\n{lines}")


def pages(port: int) -> dict[str, str]:
    """Name and page of every experiment that holds runs of ours, the newest first.

    They open on runs and models: MLflow's own start is a page about traces of agents, which no training has.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        asked = json.dumps({"max_results": 1000, "order_by": ["creation_time DESC"]})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/api/2.0/mlflow/experiments/search", asked, headers)
        found = json.loads(connection.getresponse().read()).get("experiments", [])
    finally:
        connection.close()
    return {
        one["name"]: f"http://{HOST}:{port}/#/experiments/{one['experiment_id']}?workflowType=machine_learning"
        for one in found
        if one["name"] != "Default"
    }


def answers(port: int) -> bool:
    """Whether an MLflow server says on that loopback port that it is well."""
    # http.client rather than urllib: a proxy from the environment must not see loopback addresses.
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status == 200 and response.read(64).strip() == b"OK"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps two starts in one folder apart; the kernel frees it when its holder dies."""
    with open(folder / "server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recorded(folder: Path) -> dict[str, Any]:
    """server.json, or nothing where there is none that can be read."""
    try:
        state = json.loads((folder / "server.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _is_ours(pid: int, folder: Path) -> bool:
    """Whether that process is the guard of this folder's server: a process id alone may have been given away again."""
    try:
        process = psutil.Process(pid)
        words = process.cmdline()
        return process.status() != psutil.STATUS_ZOMBIE and str(folder) in words and str(GUARD) in words
    except psutil.Error:
        return False


def _join(folder: Path, port: int | None) -> Server | None:
    """The server that already runs on this folder."""
    state = _recorded(folder)
    if not state.get("pid"):
        return None
    pid, running = int(state["pid"]), int(state["port"])
    if not _is_ours(pid, folder):
        return None
    if port is not None and port != running:
        raise UserError(
            f"A server of {folder} already runs on port {running} (process {pid}), not on {port}: "
            f"use http://{HOST}:{running}, or end that process first"
        )
    return Server(folder, running, pid, None)


def _hold_port(folder: Path, asked: int | None) -> socket.socket:
    """A socket on the asked-for port, the last one, or a free one, in this order.

    It is held until the server listens, seconds later, so that no one else gets the port meanwhile: beside a socket
    that does not listen, Linux binds another if both ask for it (SO_REUSEADDR), as the server's does.
    """
    if asked is not None:
        if (held := _bound(asked)) is None:
            raise UserError(
                f"Port {asked} on {HOST} is taken by another program: choose another, or none to get a free one"
            )
        return held
    last = _recorded(folder).get("port")
    again = _bound(last) if isinstance(last, int) else None
    free = again or _bound(0)
    if free is None:
        raise UserError(f"There is no free port on {HOST}: end what holds them.")
    return free


def _bound(port: int) -> socket.socket | None:
    """A socket bound to a port of loopback (0: to a free one), as the server's will be; None where it is taken."""
    held = socket.socket()
    beside = (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if port:
            held.setsockopt(*beside)  # connections of a server that just ended must not count
        held.bind((HOST, port))
        held.setsockopt(*beside)  # after a free one is found: before, another's that is held would do
    except OSError:
        held.close()
        return None
    return held


def _launch(folder: Path, held: socket.socket) -> Server:
    """Starts the guard in a session of its own, so that Ctrl-C in our terminal does not reach it before us."""
    port = int(held.getsockname()[1])
    command = [sys.executable, "-P", str(GUARD), str(os.getpid()), str(folder), "--", *_arguments(folder, port)]
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)  # a server that is its own client's server would call itself
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    state = folder / "server.json.new"
    state.write_text(json.dumps({"pid": process.pid, "port": port}) + "\n")
    state.replace(folder / "server.json")
    return Server(folder, port, process.pid, process, held)


def _arguments(folder: Path, port: int) -> list[str]:
    options = {
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": str(folder / "artifacts"),
        "--uvicorn-opts": "--log-level warning",  # otherwise each logged step writes a line
    }
    return ["server", *(word for pair in options.items() for word in pair)]
