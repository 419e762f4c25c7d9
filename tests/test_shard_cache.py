"""Copies of token shards on a machine's disk: what is read, how much is kept, what is damaged, who copies."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import from_values
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord
from raymuse.storage.shard_cache import GIB, ShardCache
from raymuse.storage.tokens import TokenStore

READER = """
import sys
from pathlib import Path
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord
from raymuse.storage.shard_cache import ShardCache

source, copies = Folder(sys.argv[1]), ShardCache(Path(sys.argv[2]), 10**9)
for name in sys.argv[3:]:
    data = Path(sys.argv[1], name).read_bytes()
    assert copies.read(source, FileRecord.of(name, data)) == data
"""


def files_of(folder: Path, count: int, size: int = 1000) -> list[FileRecord]:
    """Files of random bytes, and their records."""
    folder.mkdir(exist_ok=True)
    records = []
    for number in range(count):
        data = np.random.default_rng(number).bytes(size)
        (folder / f"{number}").write_bytes(data)
        records.append(FileRecord.of(f"{number}", data))
    return records


def copies_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_file()}


def test_a_store_reads_the_same_through_copies_and_then_needs_its_shards_no_more(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shards = tiny.write_shards(tmp_path / "shards")
    tokens = tiny.write_tokens(tmp_path / "tokens", shards, tiny.write_encoders(tmp_path / "encoders", shards))
    plain, rows = TokenStore(tokens), range(48)
    wanted, keys = plain.rows(rows, np.zeros(48)), plain.keys(rows)
    for _ in range(2):
        store = TokenStore(tokens, cache=ShardCache(tmp_path / "copies", GIB))
        found = store.rows(rows, np.zeros(48))
        assert np.array_equal(found.image_ids, wanted.image_ids)
        assert wanted.text_states is not None
        assert found.text_states is not None
        assert np.array_equal(found.text_states, wanted.text_states)
        assert store.keys(rows) == keys
        assert store.fingerprint == plain.fingerprint
        for name in ("tokens", "captions"):
            shutil.rmtree(Path(tokens, name), ignore_errors=True)  # the second store has its copies alone


def test_copies_take_no_more_than_they_may_and_those_not_read_for_longest_go(tmp_path: Path) -> None:
    files = files_of(tmp_path / "source", 5)
    source, cache = Folder(str(tmp_path / "source")), ShardCache(tmp_path / "copies", 3000)
    leftover = tmp_path / "copies" / f".{files[0].sha256}.1.partial"
    leftover.write_bytes(b"of a process that was killed")
    for file in (*files[:3], files[0], files[3], files[4]):
        cache.read(source, file)
    assert copies_in(tmp_path / "copies") == {files[number].sha256 for number in (0, 3, 4)}
    small = ShardCache(tmp_path / "small", 999)
    assert len(small.read(source, files[0])) == 1000
    assert copies_in(tmp_path / "small") == set()


def test_a_damaged_copy_is_made_anew_and_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    (file,) = files_of(tmp_path / "source", 1)
    source, copy = Folder(str(tmp_path / "source")), tmp_path / "copies" / file.sha256
    data = ShardCache(tmp_path / "copies", GIB).read(source, file)
    for damage in (data[:-1], bytes(1000)):  # cut; or of the right size, as after a loss of power
        copy.write_bytes(damage)
        assert ShardCache(tmp_path / "copies", GIB).read(source, file) == data == copy.read_bytes()
    copy.unlink()
    (tmp_path / "source" / "0").write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r"source/0 is not what its manifest says \(1,000 bytes of 1,000, or another"):
        ShardCache(tmp_path / "copies", GIB).read(source, file)
    assert copies_in(tmp_path / "copies") == set()


def test_processes_that_read_at_once_leave_one_whole_copy_of_each(tmp_path: Path) -> None:
    files = files_of(tmp_path / "source", 8, size=200_000)
    words = [sys.executable, "-c", READER, str(tmp_path / "source"), str(tmp_path / "copies"), *(f.name for f in files)]
    readers = [subprocess.Popen(words) for _ in range(3)]
    assert [reader.wait(120) for reader in readers] == [0, 0, 0]
    assert copies_in(tmp_path / "copies") == {file.sha256 for file in files}
    for file in files:
        assert (tmp_path / "copies" / file.sha256).read_bytes() == (tmp_path / "source" / file.name).read_bytes()


@pytest.mark.parametrize("folder", ["copies", "s3://bucket/copies"])
def test_copies_lie_on_a_disk_of_each_machine(folder: str) -> None:
    values = {"input": "x", "output": "y", "steps": 1, "shard_cache": {"folder": folder}}
    with pytest.raises(ConfigError, match="must be an absolute path on a disk of each machine"):
        from_values("train-base", values)


def test_one_interface_is_named() -> None:
    values = {"input": "x", "output": "y", "steps": 1, "network": {"interface": "eth0,eth1"}}
    with pytest.raises(ConfigError, match="is not the name of one interface, such as eth0"):
        from_values("train-base", values)
