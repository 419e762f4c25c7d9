"""Ray's own provider of make-believe machines (`autoscaling.py`), each with a folder and ports of its own."""

import os
import tempfile
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

import patient_ray
from heads import free_ports

Params = parameter.RayParams


class OwnFolders(FakeMultiNodeProvider):
    """In a common folder a node that joins would unpack a job's working folder anew, under all who stand in it."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock, mock.patch.object(parameter, "RayParams", _own), patient_ray.starts():
            super()._create_node_with_resources_and_labels(*arguments)


def _own(**given: Any) -> parameter.RayParams:
    agent, inner, metrics, environments = free_ports(4)
    ports = {"dashboard_agent_listen_port": agent, "metrics_agent_port": inner}
    ports |= {"metrics_export_port": metrics, "runtime_env_agent_port": environments}
    return Params(**given | ports, temp_dir=tempfile.mkdtemp(prefix="n", dir=os.environ["FAKE_NODES"]))
