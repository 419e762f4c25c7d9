"""A whole training on a cluster that begins without a worker, under both of Ray's autoscalers."""

import threading
from pathlib import Path

import pytest

from autoscaling import grows_like_aws
from heads import Head, running_head
from processes import wait_until
from raymuse.cli.app import main

SMALL = ["data.train=64", "data.test=8", "data.pictures_per_shard=16"]
TRAINERS = ["workers=1", "cpus_per_worker=3"]  # more than a decoder has


class Watcher:
    """The sets of node types that were seen, in order, while something ran."""

    def __init__(self, head: Head) -> None:
        self.head, self.seen = head, [head.nodes()]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            nodes = self.head.nodes()
            if nodes != self.seen[-1]:
                self.seen.append(nodes)

    @property
    def types(self) -> set[str]:
        return {name for nodes in self.seen for name in nodes}


@pytest.mark.soak
@pytest.mark.parametrize("version", [1, 2])
def test_stages_make_their_nodes_appear_and_idle_ones_go(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_head(num_cpus=0, grows=grows_like_aws(version)) as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, head.environment[name])
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)

        def submit(command: str, section: str, *changes: str) -> set[str]:
            with Watcher(head) as watched:
                assert main(["submit", command, f"smoke:{section}", f"workdir={tmp_path}/flow", *changes]) == 0
            wait_until(lambda: head.nodes() == [], 120)
            return watched.types

        assert head.nodes() == []
        assert submit("data", "data", *(change.removeprefix("data.") for change in SMALL)) == {"decoders"}
        assert submit("train", "vqgan", *TRAINERS) == {"gpus"}
        assert submit("train", "clip", *TRAINERS) == {"gpus"}
        assert submit("pretokenize", "pretokenize") == {"decoders"}
        assert submit("train", "base", *TRAINERS) == {"gpus"}
        assert (tmp_path / "flow" / "base" / "_SUCCESS").exists()
