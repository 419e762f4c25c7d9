"""The Ray that a command runs on: the one it was submitted to, or a private one that ends with it."""

import contextlib
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from raymuse.clusters import guard
from raymuse.config.errors import UserError

_LONGEST_ROOT = 24  # Ray's socket paths add about 75 characters to the folder; the kernel allows 107 in all
_SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
STARTS = 3  # of a Ray of our own


@dataclass(frozen=True)
class Cluster:
    """A Ray to work on.

    Attributes:
        ours: whether it was started here, and ends with the session.
        dashboard: host and port of the dashboard; None without one.
        token: file with the token that the dashboard and other clients ask for; None where it was not made here.
    """

    ours: bool
    dashboard: str | None
    token: Path | None


@contextlib.contextmanager
def session(
    num_cpus: int | None = None, object_store_gib: float | None = None, dashboard: bool = True
) -> Iterator[Cluster]:
    """Ray for the length of a `with` block.

    Inside a submitted job (`RAY_ADDRESS` is set), or where Ray is initialised already, that cluster is joined and
    left as it was. Otherwise a private one is started, with token authentication since Ray opens a dozen ports on
    every interface, and ended however the block ends: no process and no file of it stays behind.

    Args:
        num_cpus: logical cores of a private cluster; None: those of the machine.
        object_store_gib: shared memory for objects of a private cluster; None: as Ray chooses.
        dashboard: whether a private cluster has one (on loopback).

    Raises:
        UserError: `RAY_ADDRESS` names no cluster that answers, or there is no room for temporary files.
    """
    if ray.is_initialized():
        yield Cluster(ours=False, dashboard=None, token=None)
    elif os.environ.get("RAY_ADDRESS", "local") != "local":
        yield from _joined(os.environ["RAY_ADDRESS"])
    else:
        yield from _private(num_cpus, object_store_gib, dashboard)


def submitted() -> bool:
    """Whether this process is the driver of a submitted job."""
    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ


def _joined(address: str) -> Iterator[Cluster]:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"RAY_ADDRESS={address} is the address of a job server. To run there: `ray job submit ...` (the scripts "
            "in jobs/ say how); to run on this machine: unset RAY_ADDRESS."
        )
    _check_answers(address)
    try:
        with _our_sigterm():
            context = ray.init(address=address, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address} (unset it to run here): {error}") from error
    try:
        yield Cluster(ours=False, dashboard=context.dashboard_url or None, token=None)
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ask the port first: Ray itself tries a dead one for a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto`, or the name of a cluster
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address} (unset it to run here): {error}") from None


def _private(num_cpus: int | None, object_store_gib: float | None, dashboard: bool) -> Iterator[Cluster]:
    folder = _private_folder()
    token = _write_token(folder)
    outside = dict(os.environ)
    watching = _start_guard(folder)
    try:
        os.environ.update(_environment(token))
        _reread_authentication()
        with _our_sigterm():
            context = _started(folder, num_cpus, object_store_gib, dashboard)
        for name in ("OMP_NUM_THREADS", guard.MARK):  # for Ray's processes alone, not for this one and what it starts
            _restore(name, outside)
        yield Cluster(ours=True, dashboard=context.dashboard_url or None, token=token)
    finally:
        with _finishing():
            _end(folder)
            for name in {*os.environ, *outside}:
                _restore(name, outside)
            _reread_authentication()
            shutil.rmtree(folder, ignore_errors=True)
            watching.kill()
            watching.wait()


def _started(folder: Path, num_cpus: int | None, object_store_gib: float | None, dashboard: bool) -> Any:
    """What `ray.init` says of a Ray of our own.

    Ray gives a new node 30 s to say that it is there, which a busy machine may not keep: then it is tried again.
    """
    for left in reversed(range(STARTS)):
        try:
            return ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=None if object_store_gib is None else int(object_store_gib * 2**30),
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=False,  # stages say themselves how they get on; workers' errors come back as exceptions
                logging_level="WARNING",
                _temp_dir=str(folder),
            )
        except Exception as error:  # of no kind of its own
            if not left or "timed out during startup" not in str(error):
                raise
            print("Ray did not start within 30 s, which it allows itself: once more", file=sys.stderr)
            _end(folder)
    raise AssertionError("the last start returns or raises")


@contextlib.contextmanager
def _our_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: `ray.init` puts its own there, which exits with 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _private_folder() -> Path:
    root = tempfile.gettempdir()
    try:
        return Path(tempfile.mkdtemp(prefix="raymuse-", dir=root if len(root) <= _LONGEST_ROOT else "/tmp"))
    except OSError as error:
        raise UserError(f"cannot make a temporary folder for Ray: {error}. Free some space, or set TMPDIR.") from error


def _start_guard(folder: Path) -> subprocess.Popen[bytes]:
    """What ends this Ray if this process is killed; in a session of its own, so that Ctrl-C does not reach it."""
    command = [sys.executable, "-P", guard.__file__, str(os.getpid()), str(folder)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_hex(32))
    return path


def _environment(token: Path) -> dict[str, str]:
    """What Ray's processes, and through them all workers, inherit."""
    ours = {
        guard.MARK: str(token.parent),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it every start warns of the change
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no cloud takes this machine away: a process less a training
        "RAY_prestart_worker_first_driver": "0",  # what works here asks for few workers, and starts them itself
        # Several workers share the cores: one thread each, or they wait for one another.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if _gpus() == 0:
        ours["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed searches for an accelerator, and warns that there is none
    return ours


def _gpus() -> int:
    from ray._private.accelerators import get_accelerator_manager_for_resource

    return int(get_accelerator_manager_for_resource("GPU").get_current_node_num_accelerators())


def _reread_authentication() -> None:
    """Make Ray look at RAY_AUTH_MODE and the token again: it reads both once, when it is first imported or used."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _restore(name: str, outside: dict[str, str]) -> None:
    if name in outside:
        os.environ[name] = outside[name]
    else:
        os.environ.pop(name, None)


def _end(folder: Path) -> None:
    """End Serve and Ray, in silence: Ray reports its own end as failures. Then end what an interrupted start left."""
    processes = guard.marked(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        if ray.is_initialized() and _serve_runs():
            from ray import serve

            serve.shutdown()
        ray.shutdown()
    processes |= guard.marked(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        _, left = psutil.wait_procs(processes, timeout=3)
        processes = {*left} | guard.marked(folder)


def _serve_runs() -> bool:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["name"] == _SERVE_CONTROLLER for actor in actors)


@contextlib.contextmanager
def _finishing() -> Iterator[None]:
    """Let no second Ctrl-C or SIGTERM cut the clean-up short; a third one may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def wait(number: int, _frame: FrameType | None) -> None:
        print("ending the local Ray; once more to leave at once", file=sys.stderr)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
