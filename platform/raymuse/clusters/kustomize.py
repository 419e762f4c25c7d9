"""What `kubectl kustomize FOLDER` would apply, for the part of kustomize that our folders use.

That part is exact (a test compares it with kubectl's own); everything else is refused by name, never skipped:

    resources   files and folders, in their order
    namespace   of everything that has one
    images      newName, newTag, digest, by the name before the tag
    patches     JSON patches (RFC 6902: add, replace, remove, test) by target kind and name
"""

import copy
import re
from pathlib import Path
from typing import Any

import yaml

from raymuse.clusters.documents import Document, mapping, mappings, name_of, read_documents
from raymuse.config.errors import UserError

FILE = "kustomization.yaml"
_KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches"}
_WITHOUT_NAMESPACE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass"}


def build(folder: Path) -> list[Document]:
    """The documents of a folder, patched.

    Raises:
        UserError: something cannot be read, uses more of kustomize than this knows, or names what is not there.
    """
    path = folder / FILE
    (plan,) = read_documents(path) if path.is_file() else _no_file(folder)
    unknown = sorted(set(plan) - _KNOWN)
    if unknown or plan.get("kind", "Kustomization") != "Kustomization":
        what = ", ".join(unknown) or f"kind: {plan['kind']}"
        raise UserError(
            f"{path}: {what}: only {', '.join(sorted(_KNOWN))} of a Kustomization are built here; "
            "check what `kubectl kustomize` makes of it instead (its output is a file like any other)."
        )
    documents = [document for name in plan.get("resources", []) for document in _resource(folder / str(name), path)]
    for patch in mappings(plan.get("patches")):
        _patch(documents, patch, path)
    for document in documents:
        if plan.get("namespace") and document.get("kind") not in _WITHOUT_NAMESPACE:
            document.setdefault("metadata", {})["namespace"] = plan["namespace"]
        for image in mappings(plan.get("images")):
            _rename(document, image)
    return documents


def _no_file(folder: Path) -> list[Document]:
    raise UserError(f"{folder} is no kustomize folder: it has no {FILE}; give a file, or the folder of an overlay.")


def _resource(path: Path, named_by: Path) -> list[Document]:
    if path.is_dir():
        return build(path)
    if not path.is_file():
        raise UserError(f"{named_by}: resources: there is no {path}")
    return read_documents(path)


def _rename(value: Any, image: Document) -> None:
    """New names for the images of containers, wherever they stand."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers"):
                for container in mappings(inner):
                    if isinstance(container.get("image"), str):
                        container["image"] = _renamed(container["image"], image)
            _rename(inner, image)
    elif isinstance(value, list):
        for inner in value:
            _rename(inner, image)


def _renamed(text: str, image: Document) -> str:
    match = re.fullmatch(r"(?P<name>[^@]*?)(?P<tag>:[^:/@]+)?(?P<digest>@.+)?", text)
    assert match is not None
    if match["name"] != image.get("name"):
        return text
    name = image.get("newName", match["name"])
    if "digest" in image:
        return f"{name}@{image['digest']}"
    if "newTag" in image:
        return f"{name}:{image['newTag']}"
    return f"{name}{match['tag'] or ''}{match['digest'] or ''}"


def _patch(documents: list[Document], patch: Document, path: Path) -> None:
    target = mapping(patch.get("target"))
    if not target or set(target) - {"kind", "name"} or set(patch) - {"target", "patch"}:
        raise UserError(f"{path}: patches: each needs a `target` of kind and name, and a `patch` of JSON operations.")
    operations = yaml.safe_load(str(patch.get("patch")))
    if not isinstance(operations, list):
        raise UserError(f"{path}: patches: {target}: must be a list of operations (- op: ...), as JSON patches are.")
    hit = [document for document in documents if _is_target(document, target)]
    if not hit:
        raise UserError(f"{path}: patches: there is no {' '.join(map(str, target.values()))} to patch.")
    for document in hit:
        for operation in operations:
            try:
                _apply(document, copy.deepcopy(operation))
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise UserError(f"{path}: patches: {name_of(document)}: cannot {operation}: {error}") from None


def _is_target(document: Document, target: Document) -> bool:
    kind, name = target.get("kind"), target.get("name")
    metadata = mapping(document.get("metadata"))
    return kind in (None, document.get("kind")) and name in (None, metadata.get("name"))


def _apply(document: Document, operation: Document) -> None:
    """One operation of RFC 6902, in place."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in str(operation["path"]).split("/")[1:]]
    parent: Any = document
    for part in parts[:-1]:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]
    last, what = parts[-1], operation["op"]
    if isinstance(parent, list):
        _apply_to_list(parent, last, what, operation)
    elif what == "add":
        parent[last] = operation["value"]
    elif last not in parent:
        raise ValueError(f"there is no {operation['path']}")
    elif what == "replace":
        parent[last] = operation["value"]
    elif what == "remove":
        del parent[last]
    elif what != "test" or parent[last] != operation["value"]:
        raise ValueError(f"{what} does not hold")


def _apply_to_list(parent: list[Any], last: str, what: str, operation: Document) -> None:
    if what == "add":
        place = len(parent) if last == "-" else int(last)
        if place > len(parent):
            raise IndexError(f"the list has {len(parent)} items")
        parent.insert(place, operation["value"])
    elif what == "replace":
        parent[int(last)] = operation["value"]
    elif what == "remove":
        del parent[int(last)]
    elif what != "test" or parent[int(last)] != operation["value"]:
        raise ValueError(f"{what} does not hold")
