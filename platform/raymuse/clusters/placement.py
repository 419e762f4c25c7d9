"""Which stage runs on which machines of a cluster: the one place that says so.

A machine's part is its node label `raymuse/role`, which the files in cluster/ give:

    head        drivers, dashboard, MLflow; no work
    cpu         decode, resize, crop, and encoders, training and pictures of recipes without a GPU
    trainer     encoders and training
    generator   batches of prompts and the HTTP API
    all         everything, on clusters whose machines with GPUs are not told apart

Small work asks for a core and no role, so that a cluster of one role alone can do it: writing token shards, drawn parts
and drawn data, scores, and the API's entrance.

A cluster whose head has no role (a laptop's, one of other people) is used as it is: Ray then places by CPU and GPU
alone, and keeps work without a GPU away from machines with one where it can.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import ray

Work = Literal["decode", "encode", "train", "draw"]

ROLE = "raymuse/role"
ROLES: dict[str, frozenset[Work]] = {
    "head": frozenset(),
    "cpu": frozenset({"decode"}),
    "trainer": frozenset({"encode", "train"}),
    "generator": frozenset({"draw"}),
    "all": frozenset({"decode", "encode", "train", "draw"}),
}
"""Role -> the work that runs there. Placed work that asks for no GPU runs where decoding does, whatever it is."""

_HEAD = "node:__internal_head__"  # a resource that Ray gives the head alone


def place(work: Work, gpus: float) -> dict[str, str]:
    """Label selector for a kind of work on the cluster that is joined; empty where its head has no role."""
    return selector(work, gpus) if by_role(ray.nodes()) else {}


def encoding_task(function: Callable[..., Any], gpus: float) -> Any:
    """A remote function that runs where encoders do.

    With a GPU its process ends with it, and gives the GPU's memory back; without, the next one finds its imports there.
    """
    options = {"num_gpus": gpus, "max_calls": 1} if gpus else {}
    return ray.remote(num_cpus=1, label_selector=place("encode", gpus), **options)(function)


def by_role(nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a cluster places by role: its head has one."""
    return any(ROLE in node.get("Labels", {}) for node in nodes if _HEAD in node.get("Resources", {}))


def selector(work: Work, gpus: float) -> dict[str, str]:
    """What Ray must find among a machine's labels."""
    names = roles_for(work, gpus)
    return {ROLE: names[0] if len(names) == 1 else f"in({','.join(names)})"}


def roles_for(work: Work, gpus: float) -> list[str]:
    """The roles of machines that do a kind of work."""
    kind = work if gpus > 0 else "decode"
    return [role for role, works in ROLES.items() if kind in works]
