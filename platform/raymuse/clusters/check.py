"""Cluster files held against what will read them, and against rules of our own, without a network.

`ray up` YAML            launcher.py: Ray's own schema and preparation
KubeRay YAML             kubernetes.py: the operator's resource definitions
NetworkPolicy, ...       core_kinds.yaml: schemas of our own for the kinds of Kubernetes' own that clusters need
a folder of kustomize    kustomize.py builds what `kubectl kustomize` would; that is checked as a whole
"""

from pathlib import Path

from raymuse.clusters import kubernetes, launcher
from raymuse.clusters.documents import Document, read_documents
from raymuse.clusters.kustomize import FILE, build
from raymuse.config.errors import UserError


def check(path: str | Path) -> list[str]:
    """What is wrong with a `ray up` file, a Kubernetes file or a kustomize folder, a sentence each.

    What only a cloud or a cluster can know (instance types, secrets, images) is not checked.

    Raises:
        UserError: it cannot be read, is not YAML, or is none of the three.
    """
    path = Path(path)
    documents = load(path)
    if is_kubernetes(documents):
        whole = path.is_dir() or path.name == FILE
        return [
            *(problem for document in documents for problem in kubernetes.problems(document, path)),
            *(kubernetes.problems_together(documents) if whole else []),
        ]
    return launcher.problems(documents[0], path)


def load(path: Path) -> list[Document]:
    """The documents of a cluster file, or of a kustomize folder once it is built.

    Raises:
        UserError: as `check`.
    """
    if path.is_dir() or path.name == FILE:
        return build(path if path.is_dir() else path.parent)
    documents = read_documents(path)
    if is_kubernetes(documents) or (len(documents) == 1 and {"cluster_name", "provider"} & set(documents[0])):
        return documents
    raise UserError(
        f"{path} is no cluster file: `ray up` YAML has cluster_name and provider, KubeRay YAML apiVersion and kind."
    )


def is_kubernetes(documents: list[Document]) -> bool:
    """Whether documents are meant for Kubernetes; else they are one for `ray up`."""
    return any("apiVersion" in document for document in documents)
