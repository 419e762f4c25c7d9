"""`python patient_ray.py start ...`: the `ray` command for a machine that may be busy with all else.

A raylet ends where the agents beside it have not written their ports down within fifteen seconds, whether it was told
them or not; Ray 2.60 has no setting for it. Here ports that were given are written down first.
"""

from typing import Any
from unittest import mock

from ray._private.node import Node
from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)
from ray.scripts.scripts import main

_start_raylet = Node.start_raylet


def starts() -> Any:
    """While entered, the raylets of this process start so."""
    return mock.patch.object(Node, "start_raylet", _start_patiently)


def _start_patiently(node: Node, *arguments: Any) -> None:
    given = node._ray_params
    ports = {
        DASHBOARD_AGENT_LISTEN_PORT_NAME: given.dashboard_agent_listen_port,
        METRICS_AGENT_PORT_NAME: given.metrics_agent_port,
        METRICS_EXPORT_PORT_NAME: given.metrics_export_port,
        RUNTIME_ENV_AGENT_PORT_NAME: given.runtime_env_agent_port,
    }
    for name, port in ports.items():
        assert port, f"say the {name}"
        persist_port(node._session_dir, node.node_id, name, port)
    _start_raylet(node, *arguments)


if __name__ == "__main__":
    with starts():
        main()
