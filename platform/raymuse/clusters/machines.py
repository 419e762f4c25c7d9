"""The groups of machines that a cluster file describes, in one form whichever kind of file it is."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymuse.clusters.check import is_kubernetes, load
from raymuse.clusters.documents import Document, mapping, mappings
from raymuse.clusters.placement import ROLE
from raymuse.clusters.pods import GPU, cluster_of
from raymuse.clusters.prices import Machine, Prices, shipped
from raymuse.config.errors import UserError

_INSTANCE = "node.kubernetes.io/instance-type"
_GPU_LABELS = ("cloud.google.com/gke-accelerator", "nvidia.com/gpu.product", "karpenter.k8s.aws/instance-gpu-name")
_SPOT = ("karpenter.sh/capacity-type", "cloud.google.com/gke-spot", "eks.amazonaws.com/capacityType")
_GIB = {"Ki": 2**-20, "Mi": 2**-10, "Gi": 1.0, "Ti": 2.0**10, "K": 1e3 / 2**30, "M": 1e6 / 2**30, "G": 1e9 / 2**30}


@dataclass(frozen=True)
class Group:
    """Machines (or pods) of one kind.

    Attributes:
        role: as placement.py knows it; None where the file gives none.
        most: how many there may be.
        kind: instance type, or what a pod asks for, for people.
        hour: price of one's hour.
    """

    name: str
    role: str | None
    most: int
    kind: str
    spot: bool
    machine: Machine
    hour: float


def groups_of(path: Path, prices: Prices) -> tuple[Group, list[Group]]:
    """The head and the groups of workers.

    Raises:
        UserError: for a file that describes no cluster, or machines that the price table does not know.
    """
    documents = load(path)
    if not is_kubernetes(documents):
        return _launched(documents[0], path, prices)
    clusters = [found for document in documents if (found := cluster_of(document))]
    if len(clusters) != 1:
        raise UserError(f"{path} describes {len(clusters)} Ray clusters: give a file or folder with one.")
    head = _pods("head", mapping(clusters[0].get("headGroupSpec")), 1, path, prices)
    workers = mappings(clusters[0].get("workerGroupSpecs"))
    return head, [_pods(str(g.get("groupName")), g, int(g.get("maxReplicas", 0)), path, prices) for g in workers]


def _launched(config: Document, path: Path, prices: Prices) -> tuple[Group, list[Group]]:
    provider = mapping(config.get("provider"))
    if provider.get("type") == "local":
        machine = _machine("local", path, prices)
        head = Group("head", "head", 1, "local", False, machine, machine.hour(False))
        count = len(provider.get("worker_ips") or [])
        role = "all" if machine.gpus else "cpu"
        return head, [Group("workers", role, count, "local", False, machine, machine.hour(False))]
    groups = dict(_node_types(config, path, prices))
    name = str(config.get("head_node_type"))
    if name not in groups:
        raise UserError(
            f"{path}: head_node_type names no node type; `raymuse cluster check {path}` says all that is wrong."
        )
    head = groups.pop(name)
    return head, list(groups.values())


def _node_types(config: Document, path: Path, prices: Prices) -> Iterator[tuple[str, Group]]:
    for name, group in mapping(config.get("available_node_types")).items():
        node = mapping(mapping(group).get("node_config"))
        kind = str(node.get("InstanceType") or node.get("machineType"))
        scheduling = mapping(node.get("scheduling"))
        spot = (
            mapping(node.get("InstanceMarketOptions")).get("MarketType") == "spot"
            or scheduling.get("provisioningModel") == "SPOT"
            or bool(scheduling.get("preemptible"))
        )
        machine = _machine(kind, path, prices)
        role = mapping(group.get("labels")).get(ROLE)
        yield name, Group(name, role, int(group.get("max_workers", 0)), kind, spot, machine, machine.hour(spot))


def _machine(kind: str, path: Path, prices: Prices) -> Machine:
    if kind not in prices.machines:
        raise UserError(
            f"{path}: the price table knows no machine {kind}: copy it "
            f"({shipped()}), add a line, and give it as --prices."
        )
    return prices.machines[kind]


def _pods(name: str, group: Document, most: int, path: Path, prices: Prices) -> Group:
    """A group of pods: priced as the machine that its node selector names, else by what it asks for."""
    pod = mapping(mapping(group.get("template")).get("spec"))
    asked = [mapping(mapping(c.get("resources")).get("requests")) for c in mappings(pod.get("containers"))]
    cpus = sum(_cores(requests.get("cpu", 0)) for requests in asked)
    gib = sum(_gib(requests.get("memory", 0)) for requests in asked)
    gpus = sum(int(requests.get(GPU, 0)) for requests in asked)
    selected = {key: str(value) for key, value in mapping(pod.get("nodeSelector")).items()}
    spot = any(selected.get(key, "").lower() in ("spot", "true") for key in _SPOT)
    role, what = mapping(group.get("labels")).get(ROLE), f"{cpus:g} cores, {gib:g} GiB"
    if _INSTANCE in selected:
        whole = _machine(selected[_INSTANCE], path, prices)
        hour = whole.hour(spot)
        return Group(
            name, role, most, selected[_INSTANCE], spot, whole.model_copy(update={"cpus": cpus, "gpus": gpus}), hour
        )
    gpu = _gpu(selected, prices) if gpus else None
    if gpus and gpu is None:
        raise UserError(
            f"{path}: group {name}: which GPU it gets is not said: name it in the node selector "
            f"({_INSTANCE} or {_GPU_LABELS[0]}), as the overlays do: plan on such a folder."
        )
    hour = cpus * prices.pods.cpu + gib * prices.pods.memory_gib + (gpus * prices.gpus[gpu].hour if gpu else 0.0)
    machine = Machine(cpus=max(cpus, 0.001), gpus=gpus, gpu=gpu, on_demand=hour)
    return Group(name, role, most, what + (f", {gpus} {gpu}" if gpus else ""), spot, machine, hour)


def _gpu(selected: dict[str, str], prices: Prices) -> str | None:
    named = next((selected[label] for label in _GPU_LABELS if label in selected), "")
    words = named.upper().replace("_", "-").split("-")
    return next((gpu for gpu in prices.gpus if gpu in words), None)


def _cores(quantity: Any) -> float:
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _gib(quantity: Any) -> float:
    text = str(quantity)
    for suffix, factor in _GIB.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text) / 2**30
