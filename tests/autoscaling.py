"""Ray's real autoscaler on one machine: the node types of cluster/aws.yaml, whose nodes are processes of this machine.

The provider is Ray's own for its tests. `ray.cluster_utils.AutoscalingCluster` would start it, but needs a file that
the wheel lacks, and stops every Ray of the machine.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from heads import ROOT, Grows, Head

PROVIDER = "fake_provider.OwnFolders"
HEAD = "ray.head.default"  # what the provider says that its head is
HEAD_ID = "f" * 51 + "00000"
IDLE_SECONDS = 6
# What the machines are taken to have: work that asks for more than 2 CPUs fits on a trainer alone.
RESOURCES = {"decoders": {"CPU": 2}, "trainers": {"CPU": 4, "GPU": 1}}
EMPTY = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
EMPTY += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")


def types(head: Head, state: str) -> list[str]:
    """Node types of the nodes that are ALIVE, or that were and are DEAD."""
    return sorted(name for node in head.nodes(state) for name in RESOURCES if name in node)


def grows_like_aws(version: int) -> Grows:
    """The words and the environment of a head with no CPU of its own that adds nodes, by autoscaler 1 or 2."""

    def grows(address: str, folder: Path) -> tuple[list[str], dict[str, str]]:
        path = folder / "autoscaling.json"
        path.write_text(json.dumps(_config(address, version)))
        variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        variables |= {"PYTHONPATH": str(Path(__file__).parent), "FAKE_NODES": str(folder)}
        if version == 2:
            variables |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
            variables |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
        return [f"--autoscaling-config={path}"], variables

    return grows


def _config(address: str, version: int) -> dict[str, Any]:
    ours = yaml.safe_load((ROOT / "cluster" / "aws.yaml").read_text())
    provider: dict[str, Any] = {"type": "external", "module": PROVIDER, "gcs_address": address}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    if version == 2:
        provider |= {"launch_multiple": True, "head_node_id": HEAD_ID}
    return {
        "cluster_name": "autoscaling",
        "max_workers": ours["max_workers"],
        "upscaling_speed": ours["upscaling_speed"],
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "provider": provider,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD if name == ours["head_node_type"] else name: _node_type(name, kind)
            for name, kind in ours["available_node_types"].items()
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*EMPTY, "rsync_filter")},
    }


def _node_type(name: str, kind: dict[str, Any]) -> dict[str, Any]:
    """A node type of ours without its machine; at most two nodes of it fit on this one."""
    if name not in RESOURCES:
        return {"resources": kind.get("resources", {}), "node_config": {}, "max_workers": 0}
    resources = RESOURCES[name] | {"object_store_memory": 100 * 2**20, name: 1}  # by the last, nodes are known
    limits = {"min_workers": kind["min_workers"], "max_workers": min(2, kind["max_workers"])}
    return {"resources": resources, "labels": kind.get("labels", {}), "node_config": {}, **limits}
