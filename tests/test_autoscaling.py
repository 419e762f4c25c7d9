"""A cluster that grows for a job and shrinks after it; for every stage and both autoscalers: chaos/test_growing.py."""

from pathlib import Path

import pytest

from autoscaling import grows_like_aws, types
from heads import running_head
from processes import wait_until
from raymuse.cli.app import main


def test_a_job_makes_a_node_appear_and_idle_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data"
    with running_head(num_cpus=0, grows=grows_like_aws(version=2)) as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, head.environment[name])
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert types(head, "ALIVE") == types(head, "DEAD") == []
        words = ["submit", "data", "demo:data", "train=16", "test=4", "resolution=32", f"output={output}"]
        assert main([*words, "--address", head.address]) == 0
        assert (output / "_SUCCESS").exists()
        assert "Adding 1 node(s) of type decoders." in capfd.readouterr().out
        wait_until(lambda: not types(head, "ALIVE"), 60)
        assert set(types(head, "DEAD")) == {"decoders"}
