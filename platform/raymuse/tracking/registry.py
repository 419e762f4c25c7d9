"""Models of an MLflow registry: as folders to draw with, and as what MLflow itself can load and serve."""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from raymuse.config.base import Config
from raymuse.config.drawing import DrawingConfig
from raymuse.config.errors import UserError
from raymuse.config.generate import ServeConfig
from raymuse.config.score import CompareConfig, SideConfig
from raymuse.tracking.client import client_of

C = TypeVar("C", bound=Config)

PREFIX = "models:/"
ADDRESS_TAG = "raymuse.address"
LOADER = "raymuse.serving.pyfunc"
_NAME = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+|latest))")


def is_registered(address: str) -> bool:
    """Whether an address names a model of a registry."""
    return address.startswith(PREFIX)


def registered_folder(address: str, uri: str | None, cache: Path | None = None) -> str:
    """The model folder of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest`.

    What the registry holds is fetched once, to this machine's cache. Of a model that was too large to be uploaded it
    holds where the model lies.

    Args:
        uri: the MLflow server; None: there is none.
        cache: where fetched models are kept.

    Raises:
        UserError: for no such server, model, alias or version, and one whose files are nowhere to be found.
    """
    if (named := _NAME.fullmatch(address)) is None:
        raise UserError(f"{address}: write models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest")
    if uri is None:
        raise UserError(f"{address} is in an MLflow registry: say where with --mlflow URI, or MLFLOW_TRACKING_URI")
    version = _version(uri, **named.groupdict())
    kept = (cache or default_cache()) / f"{version.name}-{version.version}-{version.creation_timestamp}"
    where = str(version.tags.get(ADDRESS_TAG, ""))
    if not kept.exists() and version.source != where:
        _fetch(uri, str(version.source), kept)
    if _is_whole(kept):
        return str(kept)
    if not where or not _is_whole(Path(where)):
        raise UserError(
            f"{address} was registered without its weights, as version {version.version}, and {where or 'its folder'} "
            "is not on this machine: give the model folder itself"
        )
    return where


def with_model(config: C, uri: str | None) -> C:
    """The config with models of the registry as folders: of this machine, unless its cache lies on a disk of many.

    Args:
        config: one that draws, or any other, which comes back as it is.
        uri: the MLflow server; None: MLFLOW_TRACKING_URI.

    Raises:
        UserError: as `registered_folder`.
    """
    if isinstance(config, ServeConfig):
        models = {name: with_model(model, uri) for name, model in config.models.items()}
        config = config.model_copy(update={"models": models, "name": config.called})  # the cache's folder is no name
    if isinstance(config, CompareConfig):
        return config.model_copy(update={"a": _side(config.a, uri), "b": _side(config.b, uri)})
    if not isinstance(config, DrawingConfig) or not is_registered(config.model):
        return config
    return config.model_copy(update={"model": _as_folder(config.model, uri)})


def _side(side: SideConfig, uri: str | None) -> SideConfig:
    """One side of a comparison with its model as a folder."""
    if side.model is None or not is_registered(side.model):
        return side
    return side.model_copy(update={"model": _as_folder(side.model, uri), "label": side.label or side.model})


def _as_folder(model: str, uri: str | None) -> str:
    folder = registered_folder(model, uri or os.environ.get("MLFLOW_TRACKING_URI"))
    print(f"{model} is {folder}", file=sys.stderr, flush=True)
    return folder


def default_cache() -> Path:
    """A folder of this user, after the XDG convention."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "raymuse" / "models"


def mlmodel(run_id: str, path: str) -> str:
    """The `MLmodel` file of a model folder that is an artifact `path` of a run.

    It says that our own code loads it (no pickle), and what goes in and comes out.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    optional = (("negative", DataType.string), ("seed", DataType.long), ("steps", DataType.long))
    asked = [ColSpec(kind, name, required=False) for name, kind in (*optional, ("guidance", DataType.double))]
    told = [ColSpec(DataType.string, "image"), ColSpec(DataType.long, "seed")]
    signature = ModelSignature(Schema([ColSpec(DataType.string, "prompt"), *asked]), Schema(told))
    model = Model(artifact_path=path, run_id=run_id, signature=signature)
    mlflow.pyfunc.add_to_model(model, loader_module=LOADER)
    return str(model.to_yaml())


def _version(uri: str, name: str, alias: str | None, version: str | None) -> Any:
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        if version != "latest":
            return client.get_model_version(name, version)
        versions = client.search_model_versions(f"name = '{name}'")
        if not versions:
            raise UserError(f"the registry at {uri} has no model {name}")
        return max(versions, key=lambda one: int(one.version))
    except MlflowException as error:
        raise UserError(f"the registry at {uri} does not give {name}: {error.message}") from error


def _fetch(uri: str, source: str, place: Path) -> None:
    """What the registry holds of a version, whole or not at all."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        there = Path(scratch, "model")
        there.mkdir()
        try:
            there = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(there), tracking_uri=uri))
        except (MlflowException, OSError) as error:
            raise UserError(f"{source} cannot be fetched from {uri}: {error}") from error
        try:
            there.rename(place)
        except OSError:  # another process was first
            if not place.exists():
                shutil.move(there, place)


def _is_whole(folder: Path) -> bool:
    return (folder / "model_index.json").exists() and any((folder / "transformer").glob("*.safetensors"))
