"""Cluster YAML held against what will read it: Ray's cluster launcher, or KubeRay's resource definitions."""

import copy
import difflib
import functools
import gzip
import json
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from raymuse.config.errors import UserError

_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def check(path: str | Path) -> list[str]:
    """What is wrong with a `ray up` file or a KubeRay file, a sentence each; nothing, if it is right.

    What only a cloud or a cluster can know (instance types, secrets, images) is not checked.

    Raises:
        UserError: the file cannot be read, is not YAML, or is neither of the two.
    """
    documents = _documents(Path(path))
    if any("apiVersion" in document for document in documents):
        return [problem for document in documents for problem in _kubernetes_problems(document)]
    if len(documents) == 1 and {"cluster_name", "provider"} & set(documents[0]):
        return _launcher_problems(documents[0])
    raise UserError(
        f"{path} is no cluster file: `ray up` YAML has cluster_name and provider, KubeRay YAML apiVersion and kind."
    )


def _documents(path: Path) -> list[dict[str, Any]]:
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{path} is no cluster file: it must hold lines of `key: value`.")
    return documents


def _launcher_problems(config: dict[str, Any]) -> list[str]:
    """Ray's own preparation and validation; its schema is asked for all errors, as it would stop at the first."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # it tells of each default that it fills in
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    filled = copy.deepcopy(config)
    for node_type in _mappings(filled.get("available_node_types")):
        node_type.setdefault("resources", {})  # the launcher asks the cloud for them before it validates
    found = list(_schema_problems(filled, schema))
    if found:
        return found
    try:
        validate_config(prepare_config(filled))
    except Exception as error:  # Ray raises whatever a broken file leads it into: every kind is the file's fault
        return [f"{type(error).__name__}: {error}"]
    return []


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value.values() if isinstance(item, dict)] if isinstance(value, dict) else []


def _kubernetes_problems(document: dict[str, Any]) -> Iterator[str]:
    kind = document.get("kind")
    name = f"{kind} {(document.get('metadata') or {}).get('name', '(no name)')}"
    if not isinstance(kind, str):
        yield "a document has no kind"
    elif not str(document.get("apiVersion", "")).startswith("ray.io/"):
        if kind in _KINDS:
            yield f"{name}: apiVersion must be ray.io/v1, was {document.get('apiVersion')}"
    elif kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1)
        yield f"{name}: no such kind{f'; did you mean {near[0]}?' if near else ''} (known: {', '.join(_KINDS)})"
    else:
        if not (document.get("metadata") or {}).get("name"):
            yield f"{name}: metadata.name is missing"
        version = str(document["apiVersion"]).removeprefix("ray.io/")
        schema = _definition(_KINDS[kind]).get(version)
        if schema is None:
            yield f"{name}: apiVersion must be ray.io/v1, was {document['apiVersion']}"
        else:
            yield from (f"{name}: {problem}" for problem in _schema_problems(document, schema))


@functools.cache
def _definition(plural: str) -> dict[str, Any]:
    """Version -> strict JSON schema of a KubeRay resource."""
    packed = resources.files("raymuse") / "clusters" / "crds" / f"{plural}.yaml.gz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte of YAML: 0.4 s in C, 4 s in Python
    definition = yaml.load(gzip.decompress(packed.read_bytes()), Loader=loader)
    return {
        version["name"]: _strict(version["schema"]["openAPIV3Schema"]) for version in definition["spec"]["versions"]
    }


def _strict(schema: Any) -> Any:
    """As JSON schema that refuses unknown keys; the API server would drop them without a word."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        strict["additionalProperties"] = False
    if schema.get("nullable") is True and "type" in schema:
        strict["type"] = [schema["type"], "null"]
    return strict


def _schema_problems(document: Any, schema: dict[str, Any]) -> Iterator[str]:
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    for error in sorted(errors, key=lambda error: [str(part) for part in error.absolute_path]):
        where = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            known = list(error.schema.get("properties", {}))
            for key in sorted(set(error.instance) - set(known)):
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known[:12])}"
                yield f"{where}.{key}: no such key{hint}".removeprefix(".")
        else:
            yield f"{where}: {error.message}" if where else error.message
