"""What a person wants to run on a cluster: checked here, before anything is sent, and kept for a resume."""

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from raymuse.config.base import Config, StageConfig, is_address
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.recipe import split_section
from raymuse.config.training import TrainConfig
from raymuse.submit.package import SOURCE, Package, digest, slug

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Order:
    """One job as it was asked for.

    Attributes:
        command: the command of raymuse that the cluster runs, `pipeline` among them.
        recipe: what stands for it: a recipe, or the source of `data`; None: the command's own.
        changes: `key=value`.
        name: under which it is found and goes on; None: made from recipe and output.
        mlflow: server to report to.
        excludes: patterns of files that stay here.
        image: container image whose raymuse runs; None: the uploaded one.
        install: whether the machines install the pinned dependencies first.
        cpus, gpus, memory_gib: what the driver asks for; None: what its stage needs.
        stages: of a pipeline; empty: all.
    """

    command: str
    recipe: str | None
    changes: tuple[str, ...] = ()
    name: str | None = None
    mlflow: str | None = None
    excludes: tuple[str, ...] = ()
    image: str | None = None
    install: bool = False
    cpus: float | None = None
    gpus: float | None = None
    memory_gib: float | None = None
    stages: tuple[str, ...] = ()

    def label(self, config: Config) -> str:
        """The job's name: given, or the same for all that writes to the same storage.

        Raises:
            UserError: the given one cannot be part of an id.
        """
        if self.name is None:
            return f"{self.command}-{slug(self.recipe or 'default')}-{digest(storage(config))}"
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"--name {self.name}: letters, digits, `.`, `_` and `-`, up to 100, a letter or digit first."
            )
        return self.name

    def entry(self) -> list[str]:
        """The command line of the driver."""
        recipe = [] if self.recipe is None else [self.recipe]
        stages = [f"--stages={','.join(self.stages)}"] if self.stages else []
        return ["python", "-m", "raymuse.cli", self.command, *recipe, *self.changes, *stages]


def keep(order: Order, label: str, folder: Path, address: str) -> None:
    """Note a job on this machine, so that it can be resumed when the cluster has forgotten it."""
    path = _notes() / f"{label}.json"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps({"order": asdict(order), "folder": str(folder), "address": address}, indent=1))
    fresh.replace(path)


def kept(label: str) -> tuple[Order, Path]:
    """A job as it was submitted from this machine, and the folder that it was submitted from.

    Raises:
        UserError: none of that name was.
    """
    path = _notes() / f"{label}.json"
    try:
        note = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no job {label} was submitted from this machine: submit it again with the command that it was begun with."
        ) from None
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in note["order"].items()
    }
    return Order(**values), Path(note["folder"])


def _notes() -> Path:
    """A folder of this user, after the XDG convention."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "raymuse" / "jobs"


def storage(config: Config) -> str:
    """Where a job's work lies: what a resubmitted job goes on from."""
    return config.workdir if isinstance(config, FlowConfig) else str(getattr(config, "output", ""))


def check(order: Order, config: Config, package: Package) -> None:
    """What no cluster could run.

    Raises:
        UserError: an address that lies on this machine alone, a recipe that does not go along, a password in the open.
    """
    where = storage(config)
    if not _is_absolute(where):
        key = "workdir" if isinstance(config, FlowConfig) else "output"
        raise UserError(
            f"{key}={where} is relative, and a job's folder goes when the job ends: give an address that every machine "
            f"reaches, like {key}=/shared/{Path(where).name} or s3://BUCKET/{Path(where).name}."
        )
    if order.recipe is not None:
        _check_recipe(order.recipe, order, package)
    for key, address in _addresses(config):
        if not _is_absolute(address) and Path(address).exists() and not package.holds(address):
            raise UserError(
                f"{key}={address} lies on this machine and does not go along (ignored, or left out): give an address "
                "that every machine reaches."
            )
    if order.mlflow is not None and urlsplit(order.mlflow).password:
        raise UserError(
            "the address of MLflow holds a password, which everybody would read in the job's description: set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's machines."
        )


def require_reachable(order: Order, cluster: str) -> None:
    """That a cluster on other machines is not sent to an MLflow of this one.

    A cluster whose dashboard is forwarded to here has an address of this machine, and cannot be told from one on it.

    Raises:
        UserError: it would be.
    """
    if order.mlflow is None or not _is_loopback(order.mlflow) or _is_loopback(cluster):
        return
    raise UserError(
        f"MLflow at {order.mlflow} is on this machine alone, and the job runs at {cluster}: give an address that the "
        "cluster reaches with --mlflow (MLFLOW_TRACKING_URI, where that is what named it), or none: the cluster's own "
        "is then used."
    )


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_recipe(recipe: str, order: Order, package: Package) -> None:
    file = split_section(recipe)[0]
    if not file.endswith((".yaml", ".yml")):
        return  # a shipped one
    if order.image is not None:
        raise UserError(
            f"{file} is a file of this machine, and with --image nothing goes along: put it into the image."
        )
    if not package.holds(file):
        raise UserError(
            f"the recipe {file} does not go along: it is ignored, left out, or outside of {package.root}. "
            "Submit from the folder that holds it."
        )


def _is_absolute(address: str) -> bool:
    return address.startswith("/") or ":/" in address


def _addresses(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every address that a stage reads."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_address(field) and name not in ("output", "workdir"):
            yield from ((name, address) for address in ([value] if isinstance(value, str) else value or ()))
    source = getattr(config, "source", None)
    if isinstance(source, str) and isinstance(config, StageConfig):
        yield "source", source


def entry_resources(order: Order, config: Config) -> dict[str, Any]:
    """What the driver asks for: nothing where workers do the work (it then runs on the head), else what it needs."""
    here = isinstance(config, TrainConfig) and config.workers == 0
    cpus = gpus = 0.0
    if here and isinstance(config, TrainConfig):
        cpus, gpus = float(config.cpus_per_worker), float(config.use_gpu)
    elif order.command == "export":
        cpus = 1.0  # it opens the model
    asked = {
        "entrypoint_num_cpus": cpus if order.cpus is None else order.cpus,
        "entrypoint_num_gpus": gpus if order.gpus is None else order.gpus,
        "entrypoint_memory": 0 if order.memory_gib is None else int(order.memory_gib * 2**30),
    }
    return {name: amount for name, amount in asked.items() if amount}


def runtime_env(order: Order, archive: str, variables: dict[str, str]) -> dict[str, Any]:
    """Ray's runtime environment of the job.

    Args:
        archive: the package's file, or the address of one that the cluster has.
        variables: for the environment of driver and workers.
    """
    if order.image is not None:
        return {"image_uri": order.image, "env_vars": variables}
    made: dict[str, Any] = {"working_dir": archive, "env_vars": {"PYTHONPATH": SOURCE, **variables}}
    if order.install:
        made["pip"] = {"packages": pinned(), "pip_check": False}
    return made


def pinned() -> list[str]:
    """What raymuse needs, and what that needs, at the versions installed here; Ray is the cluster's own."""
    found: dict[str, str] = {}
    waiting = [Requirement("raymuse")]
    while waiting:
        wanted = waiting.pop()
        try:
            dist = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.name == "raymuse":
                raise UserError(
                    "--install needs to know what raymuse needs: install it here (pip install -e .)."
                ) from None
            continue  # for another system
        key = slug(f"{wanted.name.lower().replace('_', '-')}{sorted(wanted.extras)}", 200)
        if key in found:
            continue
        found[key] = f"{dist.metadata['Name']}=={dist.version.partition('+')[0]}"
        for line in dist.requires or []:
            needed = Requirement(line)
            extras = [*wanted.extras, ""]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    own = {"raymuse", "ray", "setuptools"}  # the last is the installer's
    return sorted({pin for pin in found.values() if pin.partition("==")[0].lower() not in own})
