"""What is wrong with this machine or a cluster: a line a check, each with what to do about it.

`ok` needs nothing; a `warning` is slow, or will be in the way of something; an `error` keeps raymuse from working.
"""

import functools
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import requests
from packaging.requirements import Requirement

from raymuse.clusters.jobserver import TIMEOUT_SECONDS, JobServer, connect
from raymuse.clusters.token import find_token
from raymuse.config.errors import UserError

Level = Literal["ok", "warning", "error"]

PYTHONS = ((3, 11), (3, 12))
GIB = 2**30
PORTS = {6379: "a Ray head", 8000: "raymuse serve", 8265: "Ray's dashboard"}
CONSTRAINTS = "constraints.txt"
SKEW_WARNING, SKEW_ERROR = 5.0, 60.0  # seconds: object stores refuse requests that are minutes off
SHOWN = 6
MLFLOW_ASKED = "/api/2.0/mlflow/experiments/search?max_results=1"
MLFLOW_SLOW = 2.0  # seconds
MLFLOW_WAITS = "until then the work goes on, and records wait on this disk"
MLFLOW_REFUSALS = {
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    403: "start it with --allowed-hosts (or MLFLOW_SERVER_ALLOWED_HOSTS) that names this address, or grant the user",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and what to do where something is to be done."""

    name: str
    level: Level
    found: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.name:<13} {self.found}" + (f": {self.todo}" if self.todo else "")


def examine(address: str | None, mlflow: str | None) -> list[Finding]:
    """Every check of this machine, and with an address those of the cluster there."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _versions,
        _gpu,
        _compiler,
        _disk,
        _shared_memory,
        _ports,
        functools.partial(_authentication, address),
        functools.partial(_mlflow, mlflow),
    ]
    if address is not None:
        checks.append(functools.partial(_cluster, address))
    return [finding for check in checks for finding in check()]


def failed(findings: Sequence[Finding]) -> bool:
    """Whether any is an error."""
    return any(finding.level == "error" for finding in findings)


def as_data(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """For `--json`."""
    return [asdict(finding) for finding in findings]


def _python() -> Iterator[Finding]:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info[:2] in PYTHONS:
        yield Finding("python", "ok", found)
    else:
        yield Finding("python", "error", found, "make a virtual environment with Python 3.11 or 3.12")


def _versions() -> Iterator[Finding]:
    """What is installed against what raymuse needs, and against the versions that it is tested with."""
    pins = _pins()
    wrong: list[str] = []
    others: list[str] = []
    needed = [Requirement(line) for line in importlib.metadata.requires("raymuse") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        pin = pins.get(_normal(one.name))
        if not one.specifier.contains(version, prereleases=True):
            wrong.append(f"{one.name} {version}, needed {one.specifier}")
        elif pin is not None and version.partition("+")[0] != pin:
            others.append(f"{one.name} {version}, tested with {pin}")
    todo = f"pip install -c {CONSTRAINTS} ..., as in the Makefile"
    if wrong:
        yield Finding("versions", "error", _some(wrong), todo)
    if others:
        yield Finding("versions", "warning", _some(others), todo)
    if not wrong and not others:
        against = f"as in {CONSTRAINTS}" if pins else f"as raymuse needs them (no {CONSTRAINTS} here to compare with)"
        yield Finding("versions", "ok", f"{len(needed)} packages {against}")


def _pins() -> dict[str, str]:
    """The constraints of the working tree, or of the repository that raymuse runs from."""
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (folder / CONSTRAINTS).is_file():
            lines = (folder / CONSTRAINTS).read_text("utf-8").splitlines()
            pairs = (line.partition("==") for line in lines if "==" in line)
            return {_normal(name): version.strip().partition("+")[0] for name, _, version in pairs}
    return {}


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _some(things: list[str]) -> str:
    more = f" and {len(things) - SHOWN} more" if len(things) > SHOWN else ""
    return "; ".join(things[:SHOWN]) + more


def _gpu() -> Iterator[Finding]:
    import torch

    driver = _driver()
    cuda = torch.version.cuda
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        yield Finding("gpu", "ok", f"{names}; driver {driver or 'unknown'}, CUDA {cuda} in torch {torch.__version__}")
    elif driver is None:
        yield Finding("gpu", "ok", "none: everything runs on the CPU")
    elif cuda is None:
        todo = "install the CUDA build of torch in the version of constraints.txt"
        yield Finding("gpu", "error", f"driver {driver}, and torch {torch.__version__} is built without CUDA", todo)
    else:
        todo = "update the driver, or see whether CUDA_VISIBLE_DEVICES hides the GPU"
        yield Finding("gpu", "error", f"driver {driver}, and torch with CUDA {cuda} finds no GPU", todo)


def _driver() -> str | None:
    """NVIDIA's driver; None where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split() or ["unknown"])[0] if done.returncode == 0 else None


def _compiler() -> Iterator[Finding]:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)]
    ninja = shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()
    if names and ninja:
        yield Finding("compiler", "ok", f"{names[0]} and ninja")
        return
    missing = " and ".join([*(["a C++ compiler"] if not names else []), *(["ninja"] if not ninja else [])])
    todo = "apt-get install g++ ninja-build, for DeepSpeed's own optimizers and compiled drawing; all else runs without"
    yield Finding("compiler", "warning", f"{missing} missing", todo)


def _disk() -> Iterator[Finding]:
    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    free = {f"{name} ({path})": shutil.disk_usage(path).free / GIB for name, path in places.items()}
    found = ", ".join(f"{name} {gib:.0f} GiB free" for name, gib in free.items())
    least = min(free.values())
    level: Level = "error" if least < 2 else "warning" if least < 10 else "ok"
    yield Finding("disk", level, found, "make room: Ray keeps its objects and logs there" if level != "ok" else "")


def _shared_memory() -> Iterator[Finding]:
    """Where Ray keeps objects: it takes up to 30 % of the memory there, and a slow disk where that does not fit."""
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding("object store", "warning", "no /dev/shm", "Ray's objects go to the disk, which is slow")
        return
    size, wanted = shutil.disk_usage(path).total / GIB, 0.3 * psutil.virtual_memory().total / GIB
    found = f"/dev/shm {size:.1f} GiB, Ray asks for up to {wanted:.1f} GiB"
    if size >= min(wanted, 200.0):
        yield Finding("object store", "ok", found)
    else:
        todo = "enlarge it (docker: --shm-size), or set ray.object_store_gib, else objects go to the disk"
        yield Finding("object store", "warning", found, todo)


def _ports() -> Iterator[Finding]:
    taken = [f"{port} ({use})" for port, use in PORTS.items() if _listens(port)]
    if taken:
        todo = "right where that is what runs there; else choose other ports"
        yield Finding("ports", "warning", f"something listens on {', '.join(taken)}", todo)
    else:
        yield Finding("ports", "ok", f"{', '.join(map(str, PORTS))} are free")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _authentication(address: str | None) -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    try:
        token = find_token()
    except UserError as error:
        nobody_asks = address is None and "no token" in str(error)
        level: Level = "warning" if nobody_asks else "error"
        yield Finding("ray auth", level, str(error).removesuffix("."))
        return
    if token is None:
        todo = "anybody who reaches such a cluster runs what they like on it: RAY_AUTH_MODE=token"
        yield Finding("ray auth", "warning", "RAY_AUTH_MODE=disabled", todo)
    elif mode is None:
        todo = "export RAY_AUTH_MODE=token: Ray's own commands decide by what they find"
        yield Finding("ray auth", "warning", f"a token in {token.place}, and RAY_AUTH_MODE is not set", todo)
    else:
        yield Finding("ray auth", "ok", f"RAY_AUTH_MODE={mode}, a token in {token.place}")


def _mlflow(uri: str | None) -> Iterator[Finding]:
    ours = importlib.metadata.version("mlflow")
    if uri is None:
        yield Finding("mlflow", "ok", f"{ours}; no server is named (--mlflow, MLFLOW_TRACKING_URI): nothing is tracked")
        return
    if not uri.startswith(("http://", "https://")):
        yield Finding("mlflow", "error", f"{uri} is no server", "name one by its address: http://HOST:5000")
        return
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    login = (user, password) if user and password else None
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", auth=login, timeout=TIMEOUT_SECONDS)
        theirs = answer.text.strip()
        # What a run asks first: the version is told to anybody, also to those whom the server refuses.
        asked = requests.get(f"{uri.rstrip('/')}{MLFLOW_ASKED}", auth=login, timeout=TIMEOUT_SECONDS)
    except requests.Timeout:
        todo = f"see its log and its data base's disk: {MLFLOW_WAITS}"
        yield Finding("mlflow", "error", f"{uri} has not answered within {TIMEOUT_SECONDS:.0f} s", todo)
        return
    except requests.RequestException as error:
        todo = f"start it (raymuse ui serves a flow's), or mend the address: {MLFLOW_WAITS}"
        yield Finding("mlflow", "error", f"{uri} does not answer ({type(error).__name__})", todo)
        return
    seconds = asked.elapsed.total_seconds()
    if asked.status_code in MLFLOW_REFUSALS:
        found = f"{uri} refuses what a run asks (status {asked.status_code}: {' '.join(asked.text.split())[:120]})"
        yield Finding("mlflow", "error", found, f"{MLFLOW_REFUSALS[asked.status_code]}: {MLFLOW_WAITS}")
    elif answer.status_code != 200 or not theirs[:1].isdigit():
        todo = "see the address, --allowed-hosts of the server, and MLFLOW_TRACKING_USERNAME and _PASSWORD"
        yield Finding("mlflow", "error", f"{uri} answers with status {answer.status_code}, and no version", todo)
    elif asked.status_code >= 500:
        found = f"{uri} cannot tell what a run asks (status {asked.status_code}: {' '.join(asked.text.split())[:120]})"
        yield Finding("mlflow", "error", found, f"see its log and its data base: {MLFLOW_WAITS}")
    elif seconds > MLFLOW_SLOW:
        todo = "no step waits for it, but its pages do: see its data base's disk, or give it Postgres"
        yield Finding("mlflow", "warning", f"{uri} took {seconds:.1f} s to answer", todo)
    elif theirs.split(".")[:2] != ours.split(".")[:2]:
        todo = "use the same on both sides: constraints.txt"
        yield Finding("mlflow", "warning", f"{uri} runs {theirs}, and this machine has {ours}", todo)
    else:
        yield Finding("mlflow", "ok", f"{uri} runs {theirs}")
    yield from _clock("MLflow's", answer)


def _cluster(address: str) -> Iterator[Finding]:
    try:
        server = connect(address)
        answer = requests.get(
            f"{server.address}/nodes?view=summary",
            headers=server.token.headers if server.token else {},
            timeout=TIMEOUT_SECONDS,
        )
        nodes = [_node for _node in answer.json()["data"]["summary"] if _node["raylet"].get("state") == "ALIVE"]
    except UserError as error:
        yield Finding("cluster", "error", str(error).removesuffix("."))
        return
    except (requests.RequestException, ValueError, KeyError) as error:
        yield Finding("cluster", "error", f"{address} does not tell its nodes ({type(error).__name__})")
        return
    yield from _nodes(server, nodes)
    yield from _clock("the cluster's", answer)


def _nodes(server: JobServer, nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    total = {kind: sum(node["raylet"]["resourcesTotal"].get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    shown = f"{total['CPU']:.0f} CPUs and {total['GPU']:.0f} GPUs now"
    yield Finding("cluster", "ok", f"Ray {server.ray_version} at {server.address}, {len(nodes)} nodes with {shown}")
    for node in nodes:
        name = f"{node['hostname']} ({node['ip']})"
        store = node["raylet"]["resourcesTotal"].get("objectStoreMemory", 0) / GIB
        if store < 1:
            todo = "stages pass pictures through it: give the node more memory, or a larger /dev/shm"
            yield Finding("object store", "warning", f"{name} has {store:.1f} GiB", todo)
        free = min((disk["free"] for disk in node.get("disk", {}).values()), default=0) / GIB
        if free < 10:
            yield Finding("disk", "warning", f"{name} has {free:.1f} GiB free", "give its machine type a larger disk")


def _clock(whose: str, answer: requests.Response) -> Iterator[Finding]:
    """This machine's clock against the time that a server put on an answer, which is exact to a second."""
    stamp = answer.headers.get("Date")
    if stamp is None:
        return
    apart = abs(time.time() - parsedate_to_datetime(stamp).timestamp())
    level: Level = "error" if apart > SKEW_ERROR else "warning" if apart > SKEW_WARNING else "ok"
    todo = "set both by NTP: object stores refuse requests from another time" if level != "ok" else ""
    yield Finding("clock", level, f"within {max(1.0, apart):.0f} s of {whose}", todo)
