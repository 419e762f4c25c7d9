"""Kubernetes files: the operator's definitions, schemas of core kinds, and our rules."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from raymuse.clusters.documents import Document, mapping, mappings, name_of, schema_problems
from raymuse.clusters.pins import version_problems
from raymuse.clusters.placement import ROLE, ROLES
from raymuse.clusters.pods import GPU, cluster_of, place_of_cluster, pod_problems, pods_of
from raymuse.clusters.schemas import RAY_KINDS, core_schemas, ray_schemas

_RAY_PODS = {"ray.io/is-ray-node": "yes"}


def problems(document: Document, path: Path) -> Iterator[str]:
    """Everything that is wrong with one document, a sentence each."""
    kind = document.get("kind")
    if not isinstance(kind, str):
        yield "a document has no kind"
        return
    yield from (f"{name_of(document)}: {problem}" for problem in _problems(document, kind, path))


def is_checked(document: Document) -> bool:
    """Whether there is a definition to hold a document against."""
    kind = document.get("kind")
    return kind in RAY_KINDS or kind in core_schemas() or str(document.get("apiVersion", "")).startswith("ray.io/")


def problems_together(documents: list[Document]) -> Iterator[str]:
    """What no document shows alone: pods of Ray that no policy guards, and disks and accounts that are missing."""
    kinds = {kind: [d for d in documents if d.get("kind") == kind] for kind in ("RayCluster", "NetworkPolicy")}
    guarded = any(_guards_ray(mapping(d.get("spec"))) for d in kinds["NetworkPolicy"])
    there = {(str(d.get("kind")), str(mapping(d.get("metadata")).get("name"))) for d in documents}
    for document in kinds["RayCluster"]:
        if not guarded:
            yield f"{name_of(document)}: no NetworkPolicy selects pods of Ray (ray.io/is-ray-node): add one"
        for wanted in sorted(_wanted(document) - there):
            yield f"{name_of(document)}: asks for the {wanted[0]} {wanted[1]}, which is not among the resources: add it"


def _guards_ray(policy: Document) -> bool:
    """Whether nobody reaches a pod of Ray but whom this policy lets in."""
    selector = mapping(policy.get("podSelector"))
    chosen = _takes_all(selector) or selector == {"matchLabels": _RAY_PODS}
    return chosen and "Ingress" in (policy.get("policyTypes") or ["Ingress"])


def _takes_all(selector: Any) -> bool:
    """Whether a selector is there and asks for nothing."""
    return isinstance(selector, dict) and not any(selector.values())


def _wanted(document: Document) -> set[tuple[str, str]]:
    found = set()
    for _, pod in pods_of(document):
        if pod.get("serviceAccountName"):
            found.add(("ServiceAccount", str(pod["serviceAccountName"])))
        for volume in mappings(pod.get("volumes")):
            if "persistentVolumeClaim" in volume:
                claim = str(mapping(volume["persistentVolumeClaim"]).get("claimName"))
                found.add(("PersistentVolumeClaim", claim))
    return found


def _problems(document: Document, kind: str, path: Path) -> Iterator[str]:
    version = str(document.get("apiVersion", ""))
    if kind in RAY_KINDS:
        yield from _ray_schema(document, kind, version)
        yield from _ray_rules(document, kind, path)
    elif version.startswith("ray.io/"):
        near = difflib.get_close_matches(kind, RAY_KINDS, n=1)
        yield f"no such kind{f'; did you mean {near[0]}?' if near else ''} (known: {', '.join(RAY_KINDS)})"
    elif kind in core_schemas():
        yield from schema_problems(document, core_schemas()[kind])
        yield from _core_rules(document, kind)
    yield from pod_problems(document, path)


def _ray_schema(document: Document, kind: str, version: str) -> Iterator[str]:
    if not mapping(document.get("metadata")).get("name"):
        yield "metadata.name is missing"
    schema = ray_schemas(kind).get(version.removeprefix("ray.io/")) if version.startswith("ray.io/") else None
    if schema is None:
        yield f"apiVersion must be ray.io/v1, was {version}"
    else:
        yield from schema_problems(document, schema)


def _ray_rules(document: Document, kind: str, path: Path) -> Iterator[str]:
    cluster = cluster_of(document)
    if kind == "RayJob" and not cluster and mapping(document.get("spec")).get("clusterSelector"):
        return  # it runs on a cluster that another file describes
    place = place_of_cluster(kind)
    if mapping(cluster.get("authOptions")).get("mode") != "token":
        yield f"{place}.authOptions: Ray would let everyone in: mode: token"
    if "rayVersion" in cluster:
        yield from version_problems(f"{place}.rayVersion", "ray", cluster["rayVersion"], path)
    else:
        yield f"{place}.rayVersion: is missing: say the version that the images have"
    if cluster.get("enableInTreeAutoscaling") and mapping(cluster.get("autoscalerOptions")).get("version") != "v2":
        yield f"{place}.autoscalerOptions.version: must be v2, which knows labels"
    head = mapping(cluster.get("headGroupSpec"))
    if head.get("enableIngress") or head.get("serviceType", "ClusterIP") != "ClusterIP":
        yield f"{place}.headGroupSpec: opens the head to the outside: leave enableIngress and serviceType away"
    yield from _service(f"{place}.headGroupSpec.headService.spec", mapping(head.get("headService")))
    yield from _groups(cluster, place)
    if kind == "RayJob" and not mapping(document.get("spec")).get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: is not true: the machines would stay, and cost, when the job is done"
    if kind == "RayService":
        spec = mapping(document.get("spec"))
        yield from _service("spec.serveService.spec", mapping(spec.get("serveService")))
        yield from _serve(spec.get("serveConfigV2"))


def _groups(cluster: Document, place: str) -> Iterator[str]:
    groups = mappings(cluster.get("workerGroupSpecs"))
    roles = [mapping(group.get("labels")).get(ROLE) for group in groups]
    head = mapping(mapping(cluster.get("headGroupSpec")).get("labels")).get(ROLE)
    if any(roles) and head != "head":
        yield f"{place}.headGroupSpec.labels: groups have roles, which count only where the head says {ROLE}: head"
    for number, (group, role) in enumerate(zip(groups, roles, strict=True)):
        where = f"{place}.workerGroupSpecs.{number} ({group.get('groupName')})"
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield f"{where}: minReplicas {least} is above maxReplicas {most}"
        gpus = _gpus(group)
        if role is None and head == "head":
            yield f"{where}: has no label {ROLE}: no stage would run there"
        elif role is not None and (role not in ROLES or role == "head"):
            yield f"{where}: {ROLE} must be one of {', '.join(name for name in ROLES if name != 'head')}, was {role}"
        elif role == "cpu" and gpus:
            yield f"{where}: has the role cpu and {gpus} GPUs, which no stage would use: give it the role all"
        elif role not in (None, "cpu") and not gpus:
            yield f"{where}: has the role {role} and no limit of {GPU}: it would get no GPU"


def _gpus(group: Document) -> int:
    pod = mapping(mapping(group.get("template")).get("spec"))
    limits = [mapping(mapping(c.get("resources")).get("limits")).get(GPU, 0) for c in mappings(pod.get("containers"))]
    return sum(int(limit) for limit in limits if str(limit).isdigit())


def _serve(text: Any) -> Iterator[str]:
    """`serveConfigV2` against Serve's schema, and our application's own arguments against its config."""
    from ray.serve.schema import ServeDeploySchema

    from raymuse.config.errors import ConfigError, UserError
    from raymuse.config.generate import ServeConfig, models_of
    from raymuse.config.load import from_values

    where = "spec.serveConfigV2"
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(str(text)))
    except yaml.YAMLError as error:
        yield f"{where}: is not YAML: {error}"
        return
    except ValidationError as error:
        for problem in error.errors():
            yield f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        return
    for application in config.applications:
        if application.import_path == "raymuse.serving.deploy:application":
            try:
                served = from_values("serve", dict(application.args))
                assert isinstance(served, ServeConfig)
                models_of(served)
            except ConfigError as error:
                yield from (f"{where}: {application.name}: {problem}" for problem in error.problems)
            except UserError as error:
                yield f"{where}: {application.name}: {error}"


def _core_rules(document: Document, kind: str) -> Iterator[str]:
    spec = mapping(document.get("spec"))
    if kind == "Secret" and (document.get("data") or document.get("stringData")):
        yield "holds its value in the file: make it with `kubectl create secret` and keep the file free of it"
    if kind == "Service":
        yield from _service("spec", document)
    if kind == "NetworkPolicy":
        yield from _policy(spec)


def _service(where: str, service: Document) -> Iterator[str]:
    kind = mapping(service.get("spec")).get("type")
    if kind in ("NodePort", "LoadBalancer"):
        yield f"{where}.type: {kind} opens it to the outside: leave it away, and put a gateway with TLS before it"


def _policy(spec: Document) -> Iterator[str]:
    if "ingress" in spec and "Ingress" not in (spec.get("policyTypes") or ["Ingress"]):
        yield "spec.policyTypes: does not name Ingress, so that the rules of ingress would not count"
    if "egress" in spec and "Egress" not in (spec.get("policyTypes") or []):
        yield "spec.policyTypes: does not name Egress, so that the rules of egress would not count"
    for number, rule in enumerate(mappings(spec.get("ingress"))):
        if not rule.get("from"):
            yield f"spec.ingress.{number}: has no `from`, so that everyone may come: name the pods"
        for peer in mappings(rule.get("from")):
            if mapping(peer.get("ipBlock")).get("cidr") in ("0.0.0.0/0", "::/0"):
                yield f"spec.ingress.{number}: lets the whole world in: name the addresses that may come"
            if _takes_all(peer.get("namespaceSelector")) and _takes_all(peer.get("podSelector", {})):
                yield f"spec.ingress.{number}: lets every pod of every namespace in: name the pods"
