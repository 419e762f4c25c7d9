"""Ray's own provider of make-believe machines (`autoscaling.py`), each with a folder of its own."""

import os
import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class OwnFolders(FakeMultiNodeProvider):
    """In a common folder a node that joins would unpack a job's working folder anew, under all who stand in it."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        own = partial(parameter.RayParams, temp_dir=tempfile.mkdtemp(prefix="n", dir=os.environ["FAKE_NODES"]))
        with self.lock, mock.patch.object(parameter, "RayParams", own):
            super()._create_node_with_resources_and_labels(*arguments)
