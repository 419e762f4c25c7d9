"""Pods in Kubernetes files: where a document holds them, and what they may not do."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raymuse.clusters.documents import Document, mapping, mappings
from raymuse.clusters.pins import image_problems

GPU = "nvidia.com/gpu"
_CLUSTER = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
_SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|API_?KEY", re.IGNORECASE)
_OF_THE_MACHINE = {"hostNetwork": "addresses", "hostPID": "processes", "hostIPC": "shared memory"}


def cluster_of(document: Document) -> Document:
    """The Ray cluster that a document describes; empty where it describes none."""
    found: Any = document if document.get("kind") in _CLUSTER else {}
    for key in _CLUSTER.get(str(document.get("kind")), ()):
        found = mapping(mapping(found).get(key))
    return mapping(found)


def place_of_cluster(kind: str) -> str:
    """Where a document of that kind describes it, for messages."""
    return ".".join(_CLUSTER[kind])


def pods_of(document: Document) -> Iterator[tuple[str, Document]]:
    """Where a document holds pod specs, and these. A RayJob's submitter is among them where the file describes it."""
    kind, spec = str(document.get("kind")), mapping(document.get("spec"))
    if kind in ("Deployment", "StatefulSet"):
        yield "spec.template.spec", mapping(mapping(spec.get("template")).get("spec"))
    if kind == "RayJob" and "submitterPodTemplate" in spec:
        yield "spec.submitterPodTemplate.spec", mapping(mapping(spec["submitterPodTemplate"]).get("spec"))
    if kind in _CLUSTER:
        place, cluster = place_of_cluster(kind), cluster_of(document)
        groups = {f"{place}.headGroupSpec": mapping(cluster.get("headGroupSpec"))}
        for number, group in enumerate(mappings(cluster.get("workerGroupSpecs"))):
            groups[f"{place}.workerGroupSpecs.{number}"] = group
        for where, group in groups.items():
            if group:
                yield f"{where}.template.spec", mapping(mapping(group.get("template")).get("spec"))


def pod_problems(document: Document, path: Path) -> Iterator[str]:
    """What is wrong with a document's pods, a sentence each."""
    for where, pod in pods_of(document):
        for key, what in _OF_THE_MACHINE.items():
            if pod.get(key):
                yield f"{where}.{key}: pods would have the machine's own {what}: leave it away"
        for number, volume in enumerate(mappings(pod.get("volumes"))):
            if "hostPath" in volume:
                yield f"{where}.volumes.{number}: hostPath gives pods the machine's own files: take a claim"
        security = mapping(pod.get("securityContext"))
        if not security.get("runAsNonRoot"):
            yield f"{where}.securityContext: pods may run as root: runAsNonRoot: true"
        if security.get("runAsUser") == 0:
            yield f"{where}.securityContext: runAsUser: 0 is root"
        for key in ("initContainers", "containers"):
            for number, container in enumerate(mappings(pod.get(key))):
                at = f"{where}.{key}.{number}"
                yield from _container(at, container, path)
                if key == "containers":
                    yield from _resources(f"{at}.resources", mapping(container.get("resources")))


def _container(where: str, container: Document, path: Path) -> Iterator[str]:
    yield from image_problems(f"{where}.image", container.get("image"), path)
    security = mapping(container.get("securityContext"))
    if security.get("privileged") or security.get("allowPrivilegeEscalation") is not False:
        yield f"{where}.securityContext: a process may gain rights: allowPrivilegeEscalation: false"
    if security.get("runAsNonRoot") is False or security.get("runAsUser") == 0:
        yield f"{where}.securityContext: overrides the pod's, and may run as root: leave that to the pod"
    for port in mappings(container.get("ports")):
        if port.get("hostPort"):
            yield f"{where}.ports: {port['hostPort']} would be open on the machine: leave hostPort away"
    for variable in mappings(container.get("env")):
        if _SECRET.search(str(variable.get("name"))) and variable.get("value"):
            yield f"{where}.env: {variable['name']} stands in the file: take it from a secret (valueFrom.secretKeyRef)"


def _resources(where: str, resources: Document) -> Iterator[str]:
    requests, limits = mapping(resources.get("requests")), mapping(resources.get("limits"))
    for name in ("cpu", "memory"):
        if name not in requests or name not in limits:
            yield f"{where}: says no request and limit of {name}: Ray counts a pod's resources by them"
    if requests.get(GPU) != limits.get(GPU) and GPU in {**requests, **limits}:
        yield f"{where}: requests {requests.get(GPU)} GPUs and limits {limits.get(GPU)}: make them equal"
