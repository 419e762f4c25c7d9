"""`raymuse doctor` on this machine, whole and broken on purpose; on a cluster: test_jobs.py."""

import contextlib
import importlib.metadata
import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymuse import doctor
from raymuse.cli.app import main
from raymuse.doctor import Finding, examine


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound token."""
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("c0ffee")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return path


def named(name: str, address: str | None = None, mlflow: str | None = None) -> Finding:
    (found,) = [finding for finding in examine(address, mlflow) if finding.name == name]
    return found


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    wanted = {"python", "versions", "gpu", "compiler", "disk", "object store", "ports", "ray auth", "mlflow"}
    assert set(findings) == wanted
    assert {findings[name]["level"] for name in ("python", "versions", "gpu", "ray auth", "mlflow")} == {"ok"}
    assert all(set(one) == {"name", "level", "found", "todo"} for one in findings.values())
    assert all(one["todo"] for one in findings.values() if one["level"] != "ok")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == len(wanted)
    assert "c0ffee" not in text


def test_it_runs_without_a_working_tree(tmp_path: Path) -> None:
    """In a process of its own, from a folder that holds no constraints.txt, no git and no recipes."""
    done = subprocess.run(
        [sys.executable, "-m", "raymuse.cli", "doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {one["name"] for one in json.loads(done.stdout)} >= {"python", "versions", "disk", "ray auth"}
    assert list(tmp_path.iterdir()) == [tmp_path / "token"]  # it looks, and leaves nothing


def test_a_wrong_python_and_wrong_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "PYTHONS", ((3, 99),))
    assert named("python").level == "error"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constraints.txt").write_text("pillow==1.0\n")
    found = named("versions")
    assert (found.level, "tested with 1.0" in found.found) == ("warning", True)
    wanted = ["pillow<1", "no-such-package", 'pytest>99; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _name: wanted)
    found = named("versions")
    assert found.level == "error"
    assert "needed <1" in found.found
    assert "no-such-package is missing" in found.found
    assert "pytest" not in found.found


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [("550.1", None, "is built without CUDA"), ("550.1", "12.6", "finds no GPU")],
)
def test_a_gpu_that_torch_does_not_see(
    driver: str, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: what the driver and torch would say is put in their place."""
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = named("gpu")
    assert (found.level, said in found.found) == ("error", True)


def test_what_is_scarce_or_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    assert "a C++ compiler" in named("compiler").found
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "PORTS", {taken.getsockname()[1]: "a test"})
        found = named("ports")
    assert (found.level, "(a test)" in found.found) == ("warning", True)
    for free, level in ((1, "error"), (5, "warning"), (50, "ok")):
        usage = SimpleNamespace(total=free * 2**30, free=free * 2**30)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path, usage=usage: usage)
        assert named("disk").level == level
    usage.total = 2**20
    assert named("object store").level == "warning"


def test_authentication(monkeypatch: pytest.MonkeyPatch, token: Path) -> None:
    assert named("ray auth").level == "ok"
    token.chmod(0o644)
    assert named("ray auth").level == "error"
    assert "chmod 600" in named("ray auth").found
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert named("ray auth").level == "warning"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(token.parent))
    assert named("ray auth").level == "warning"  # nobody asks for one yet


class OldServer(BaseHTTPRequestHandler):
    """An MLflow of another version, with a clock of its own: neither can be had here."""

    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(b"2.1.0")

    def log_message(self, *_words: object) -> None:
        pass


def test_mlflow_and_its_clock(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), OldServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert named("mlflow", mlflow=uri).level == "warning"
        assert named("clock", mlflow=uri).level == "error"
        assert main(["doctor", "--mlflow", uri]) == 1
        server.shutdown()
    assert "error    clock" in capsys.readouterr().out
    assert named("mlflow", mlflow="http://127.0.0.1:1").level == "error"
    assert named("mlflow", mlflow="sqlite:///x.db").level == "error"


class Refusing(BaseHTTPRequestHandler):
    """An MLflow that tells its version to everybody, and refuses or keeps waiting whoever asks for more."""

    status, seconds = 403, 0.0

    def do_GET(self) -> None:
        asks_version = self.path == "/version"
        time.sleep(0 if asks_version else self.seconds)
        ours = importlib.metadata.version("mlflow")
        with contextlib.suppress(BrokenPipeError):  # who asked has not waited
            self.send_response(200 if asks_version else self.status)
            self.end_headers()
            self.wfile.write(ours.encode() if asks_version else b"Invalid Host header - possible DNS rebinding attack")

    def log_message(self, *_words: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "seconds", "level", "found", "todo"),
    [
        (403, 0.0, "error", "refuses what a run asks (status 403: Invalid Host header", "--allowed-hosts"),
        (401, 0.0, "error", "status 401", "MLFLOW_TRACKING_USERNAME"),
        (500, 0.0, "error", "cannot tell what a run asks (status 500", "its data base"),
        (200, 0.3, "warning", "s to answer", "no step waits for it"),
        (200, 3.0, "error", "has not answered within", "records wait on this disk"),
        (200, 0.0, "ok", "runs", ""),
    ],
)
def test_an_mlflow_that_refuses_or_is_slow(
    status: int, seconds: float, level: str, found: str, todo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "MLFLOW_SLOW", 0.2 if seconds else 100.0)
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 1.0 if seconds > 1 else 100.0)
    monkeypatch.setattr(Refusing, "status", status)
    monkeypatch.setattr(Refusing, "seconds", seconds)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        finding = named("mlflow", mlflow=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert finding.level == level
    assert found in finding.found
    assert todo in finding.todo


def test_a_cluster_that_is_not_there() -> None:
    found = named("cluster", address="http://127.0.0.1:1")
    assert found.level == "error"
    assert "nothing listens" in found.found
