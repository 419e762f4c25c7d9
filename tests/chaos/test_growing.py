"""A whole training on a cluster that begins without a worker, under both of Ray's autoscalers."""

from collections import Counter
from pathlib import Path

import pytest

from autoscaling import RESOURCES, grows_like_aws, types
from heads import running_head
from processes import wait_until
from raymuse.cli.app import main

SMALL = ["data.train=64", "data.test=8", "data.pictures_per_shard=16"]
TRAINERS = ["workers=1", "cpus_per_worker=3"]  # more than a decoder has


@pytest.mark.soak
@pytest.mark.parametrize("version", [1, 2])
def test_stages_make_their_nodes_appear_and_idle_ones_go(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with running_head(num_cpus=0, grows=grows_like_aws(version)) as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, head.environment[name])
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)

        def submit(command: str, section: str, *changes: str) -> set[str]:
            """The types of the nodes that a job made appear; all of them have gone again."""
            before = Counter(types(head, "DEAD"))
            assert main(["submit", command, f"smoke:{section}", f"workdir={tmp_path}/flow", *changes]) == 0
            wait_until(lambda: not types(head, "ALIVE"), 300, pause=0.5)
            appeared = set(Counter(types(head, "DEAD")) - before)
            said = capfd.readouterr().out
            told = {kind for kind in RESOURCES if f"node(s) of type {kind}." in said}
            # The first autoscaler tells a job's driver of what came before it, too.
            assert appeared <= told <= set(types(head, "DEAD")), said
            return appeared

        assert types(head, "ALIVE") == types(head, "DEAD") == []
        assert submit("data", "data", *(change.removeprefix("data.") for change in SMALL)) == {"decoders"}
        assert submit("train", "vqgan", *TRAINERS) == {"trainers"}
        assert submit("train", "clip", *TRAINERS) == {"trainers"}
        assert submit("pretokenize", "pretokenize") == {"decoders"}
        assert submit("train", "base", *TRAINERS) == {"trainers"}
        assert (tmp_path / "flow" / "base" / "_SUCCESS").exists()
