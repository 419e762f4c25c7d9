"""A cluster that grows for a job, loses a node, and shrinks; all stages and both autoscalers: chaos/test_growing.py."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny
from autoscaling import grows_like_aws, types
from heads import Head, running_head
from nodes import Node, nodes_of
from processes import wait_until
from raymuse.cli.app import main
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.storage.images import list_shards
from raymuse.storage.token_check import check_tokens
from raymuse.storage.tokens import TokenStore

PARTS = 40


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(num_cpus=0, grows=grows_like_aws(version=2)) as started:
        yield started


@pytest.fixture(autouse=True)
def shell(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head as a person's shell knows it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, head.environment[name])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_job_makes_a_node_appear_and_idle_it_goes(
    head: Head, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert types(head, "ALIVE") == []
    output = tmp_path / "data"
    words = ["submit", "data", "demo:data", "train=16", "test=4", "resolution=32", f"output={output}"]
    assert main(words) == 0
    assert (output / "_SUCCESS").exists()
    assert "Adding 1 node(s) of type decoders." in capfd.readouterr().out
    wait_until(lambda: not types(head, "ALIVE"), 300, pause=0.5)
    assert set(types(head, "DEAD")) == {"decoders"}


def test_a_node_that_crashes_loses_and_changes_nothing(head: Head, tmp_path: Path) -> None:
    """It works when it goes; another appears in its place."""
    shards = tiny.write_shards(tmp_path / "shards", count=4 * PARTS, per_shard=4)
    encoders = tiny.write_encoders(tmp_path / "encoders", shards)
    values = {"input": shards, "output": str(tmp_path / "tokens"), "vqgan": encoders, "text_encoder": encoders}
    values |= {"resolution": tiny.SIDE, "low_resolution": tiny.LOW_SIDE, "chunk_size": 4, "encoders": 2}
    config = PretokenizeConfig(**values)
    codes: list[int] = []
    words = ["submit", "pretokenize", "smoke:pretokenize", *(f"{name}={value}" for name, value in values.items())]
    job = threading.Thread(target=lambda: codes.append(main(words)))
    job.start()
    wait_until(lambda: codes or (written(tmp_path / "tokens") and encoding(head)), 300, pause=0.05)
    assert not codes, "the job ended before its node could"
    encoding(head)[0].crash()
    assert written(tmp_path / "tokens") < PARTS
    job.join(400)
    assert codes == [0]
    assert check_tokens(config.output).problems == []
    store, encoder = TokenStore(config.output), ChunkEncoder(config)
    assert len(store.names) == PARTS
    for name, shard in zip(store.names, list_shards(shards), strict=True):
        (chunk,) = decode_chunks(shard, config)
        ids = encoder(chunk).tokens["image_ids"].combine_chunks().flatten().to_numpy()
        np.testing.assert_array_equal(store.part(name).image_ids.reshape(-1), ids)
    wait_until(lambda: not types(head, "ALIVE"), 300, pause=0.5)


def written(output: Path) -> int:
    return len(list(output.glob("_manifest/part-*")))


def encoding(head: Head) -> list[Node]:
    """Nodes on which an encoder works."""
    return [node for node in nodes_of(head) if any("MapWorker" in title for title in node.titles())]
