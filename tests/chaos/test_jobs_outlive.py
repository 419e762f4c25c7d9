"""A pipeline whose cluster dies in the middle, submitted again to another cluster: the same work, the same runs."""

import sqlite3
from pathlib import Path

import pytest

from heads import Head, running_head
from processes import wait_until
from raymuse.cli.app import main
from raymuse.config.recipe import SECTIONS
from raymuse.tracking.server import Server

CHANGES = ("data.train=64", "data.test=8", "data.pictures_per_shard=16", "base.steps=40", "base.checkpoint.every=5")


@pytest.mark.soak
def test_a_pipeline_goes_on_when_its_cluster_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = tmp_path / "flow"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def use(head: Head) -> None:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.setenv(name, head.environment[name])
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)

    with Server.start(tmp_path / "mlflow") as mlflow:
        words = ["submit", "--pipeline", "smoke", f"workdir={flow}", *CHANGES, "--name", "row", "--mlflow", mlflow.uri]
        with running_head() as first:
            use(first)
            assert main([*words, "--no-follow"]) == 0
            wait_until(lambda: list(flow.glob("base/step-*")), 600)
            assert not (flow / "base" / "_SUCCESS").exists()
        kept = {path: path.stat().st_mtime_ns for path in flow.rglob("*.tar")}
        kept |= {path: path.stat().st_mtime_ns for path in (flow / "vqgan" / "model").rglob("*.safetensors")}
        assert len(kept) > 4
        with running_head() as second:
            use(second)
            assert main(["jobs", "resume", "row"]) == 0
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        with sqlite3.connect(mlflow.folder / "mlflow.db") as records:
            runs = dict(records.execute("SELECT name, status FROM runs").fetchall())
            (count,) = records.execute("SELECT count(*) FROM runs").fetchone()
            parents = records.execute("SELECT value FROM tags WHERE key = 'mlflow.parentRunId'").fetchall()
            (row,) = records.execute("SELECT run_uuid FROM runs WHERE name = 'flow'").fetchone()
            scores = records.execute("SELECT key FROM latest_metrics WHERE run_uuid = ?", (row,)).fetchall()
    assert runs == dict.fromkeys([*SECTIONS, "flow"], "FINISHED")
    assert count == len(runs)  # each stage went on in its own run
    assert parents == [(row,)] * len(SECTIONS)
    assert any(name.startswith("clip_score") for (name,) in scores)
