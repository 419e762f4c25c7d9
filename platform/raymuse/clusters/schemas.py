"""JSON schemas of what a Kubernetes file of ours may hold: KubeRay's resources, and core kinds."""

import functools
import gzip
from importlib import resources
from typing import Any

import yaml

from raymuse.clusters.documents import Document

RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


@functools.cache
def ray_schemas(kind: str) -> dict[str, Document]:
    """Version -> strict schema of a KubeRay resource, from the operator's own definition (clusters/crds)."""
    packed = resources.files("raymuse") / "clusters" / "crds" / f"{RAY_KINDS[kind]}.yaml.gz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte of YAML: 0.4 s in C, 4 s in Python
    definition = yaml.load(gzip.decompress(packed.read_bytes()), Loader=loader)
    return {version["name"]: strict(version["schema"]["openAPIV3Schema"]) for version in definition["spec"]["versions"]}


@functools.cache
def core_schemas() -> dict[str, Document]:
    """Kind -> strict schema, apiVersion included, of the core kinds that are checked."""
    text = (resources.files("raymuse") / "clusters" / "core_kinds.yaml").read_text("utf-8")
    kinds: dict[str, Document] = yaml.safe_load(text)["kinds"]
    return {kind: _whole(kind, schema) for kind, schema in kinds.items()}


def _whole(kind: str, schema: Document) -> Document:
    own = {"apiVersion": {"const": schema["apiVersion"]}, "kind": {"const": kind}}
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", *schema.get("required", [])],
        "additionalProperties": False,
        "properties": {**own, **_with_pods(schema["properties"])},
    }


def _with_pods(schema: Any) -> Any:
    if schema == "pod":
        spec = ray_schemas("RayCluster")["v1"]["properties"]["spec"]["properties"]
        return spec["headGroupSpec"]["properties"]["template"]
    if isinstance(schema, dict):
        return {key: _with_pods(value) for key, value in schema.items()}
    return schema


def strict(schema: Any) -> Any:
    """As JSON schema that refuses unknown keys; the API server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        made["additionalProperties"] = False
    if schema.get("nullable") is True and "type" in schema:
        made["type"] = [schema["type"], "null"]
    return made
