"""Which code does the work: version, commit, and the packages that it runs with."""

import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path

SHOWN = ("raymuse", "torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "mlflow", "numpy", "pillow")
COMMIT = "raymuse.commit"
JOB_VARIABLE = "RAYMUSE_JOB"  # id of a job's attempt, in the environment of its processes


def commit(root: Path) -> str | None:
    """Git's commit of a folder, with `-dirty` where files differ from it; None outside of git."""
    head = git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return head.strip() + ("-dirty" if git(root, "status", "--porcelain", "--", ".") else "")


def git(root: Path, *words: str) -> str | None:
    """What git says of a folder; None where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@functools.cache
def installed() -> dict[str, str]:
    """Every installed package and its version, by lower-case name."""
    found = {one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}
    return dict(sorted(found.items()))


def versions() -> dict[str, str]:
    """Python and the packages that decide what comes out, those of them that are there."""
    there = installed()
    return {"python": platform.python_version(), **{name: there[name] for name in SHOWN if name in there}}


def code_tags(command: str) -> dict[str, str]:
    """A run's tags about its code, MLflow's own among them.

    Args:
        command: what a person typed, such as `raymuse train`.
    """
    tags = {
        "mlflow.source.name": command,
        "mlflow.source.type": "JOB" if JOB_VARIABLE in os.environ else "LOCAL",
        "mlflow.user": os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid()),
        "raymuse.host": socket.gethostname(),
        **{f"version.{name}": version for name, version in versions().items()},
    }
    known = own_commit()
    return tags if known is None else {**tags, COMMIT: known, "mlflow.source.git.commit": known.removesuffix("-dirty")}


def own_version() -> str | None:
    """Of this very package; None where it runs from a folder that was never installed."""
    try:
        return importlib.metadata.version("raymuse")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def own_commit() -> str | None:
    """Of the repository that this very package lies in; an installed one lies in none."""
    root = Path(__file__).parents[3]
    return commit(root) if (root / ".git").exists() else None
