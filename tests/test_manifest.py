"""Exactly once: files whole or absent, parts recorded after them, changed configs refused, locks that never block."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raymuse.config.errors import UserError
from raymuse.storage import manifest as module
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, Manifest, PartRecord, differing, read_finished, read_records

SIZE = 200_000
WRITER = f"""
import sys
from raymuse.storage.folder import Folder
folder = Folder(sys.argv[1])
print("writing", flush=True)
for number in range(10**9):
    folder.write(f"{{number % 50:03d}}.bin", bytes([number % 251]) * {SIZE})
"""

KILLED_HOLDER = """
import os, sys
from raymuse.storage.manifest import Manifest
Manifest.open(sys.argv[1], {})
os.kill(os.getpid(), 9)
"""


def addresses(tmp_path: Path) -> dict[str, str]:
    return {"local": str(tmp_path / "out"), "memory": f"memory://{uuid.uuid4().hex}/out"}


@pytest.fixture(params=["local", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return addresses(tmp_path)[request.param]


def add(manifest: Manifest, *numbers: int, rows: int = 3) -> None:
    for number in numbers:
        name = f"part-{number:06d}"
        manifest.write_part(
            name, {f"data/{name}.bin": b"%d" % number * 10}, rows=rows, rejects=1, source=f"{number}.tar"
        )


# --- files


def test_a_writer_killed_again_and_again_leaves_no_partial_file(tmp_path: Path) -> None:
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        deadline = time.monotonic() + 20
        while not (tmp_path / "004.bin").exists() and time.monotonic() < deadline:
            pass
        writer.kill()
        assert writer.wait() == -9
        writer.stdout.close()
        whole = [path.read_bytes() for path in tmp_path.glob("*.bin") if not path.name.startswith(".")]
        assert len(whole) >= 5
        assert all(len(data) == SIZE and len(set(data)) == 1 for data in whole)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a.bin", b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        folder.write_local("a.bin", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert folder.read("a.bin") == b"old"


@pytest.mark.parametrize(
    ("address", "folder", "name"),
    [
        ("a.png", ".", "a.png"),
        ("/a.png", "/", "a.png"),
        ("b/a.png", "b", "a.png"),
        ("/c/b/a.png", "/c/b", "a.png"),
        ("s3://bucket/a.png", "s3://bucket", "a.png"),
    ],
)
def test_a_file_is_held_by_its_folder(address: str, folder: str, name: str) -> None:
    assert Folder.holding(address) == (Folder(folder), name)


def test_a_folder_reads_lists_and_removes_what_it_wrote(address: str) -> None:
    folder = Folder(address)
    assert folder.names() == []
    folder.create()
    folder.write("b.bin", b"1")
    folder.write("deep/er/a.bin", b"2")
    assert folder.names() == ["b.bin", "deep"]
    assert (folder / "deep").names("er") == ["a.bin"]
    assert folder.read("deep/er/a.bin") == b"2"
    folder.write("b.bin", b"3")
    assert folder.read("b.bin") == b"3"
    folder.remove("deep")
    folder.remove("deep")
    assert folder.names() == ["b.bin"]
    assert folder.exists("b.bin")
    assert not folder.exists("deep/er/a.bin")
    folder.write("a.bin", b"4")
    folder.write("c.bin", b"5")
    folder.remove_files([])
    folder.remove_files(["a.bin", "b.bin"])
    folder.remove_files(["a.bin"])
    assert folder.names() == ["c.bin"]


def test_file_addresses_are_local(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}/x")
    folder.create()
    folder.write("a", b"1")
    assert (tmp_path / "x" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("where", ["file", "below a file", "/proc"])
def test_an_output_that_cannot_be_written_is_one_sentence(where: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    place = {"file": tmp_path / "taken", "below a file": tmp_path / "taken" / "x", "/proc": Path("/proc/raymuse")}[
        where
    ]
    with pytest.raises(UserError, match=r"^cannot write to .+: .+\. Choose an output folder that you may write to\.$"):
        Manifest.open(str(place), {})


def test_too_little_disk_is_said_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    folder = Folder(str(tmp_path / "not" / "made" / "yet"))
    folder.require_free(2**30)
    with pytest.raises(UserError, match=r"has 1\.00 GiB free and this needs about 3\.00 GiB"):
        folder.require_free(3 * 2**30)
    Folder("memory://x").require_free(2**60)


# --- parts


def test_a_run_that_was_stopped_goes_on_with_what_is_left(address: str) -> None:
    plan = [f"part-{number:06d}" for number in range(5)]
    first = Manifest.open(address, {"seed": 1})
    add(first, 0, 3)
    again = Manifest.open(address, {"seed": 1})
    assert again.pending(plan) == [plan[1], plan[2], plan[4]]
    assert not again.finished
    add(again, 1, 2, 4)
    again.finish(note="x")
    assert again.finished
    assert Manifest.open(address, {"seed": 1}).pending(plan) == []
    assert json.loads(Folder(address).read("_SUCCESS")) == {"parts": 5, "rows": 15, "rejects": 5, "note": "x"}
    assert list(read_finished(address, "pretokenize")) == plan


def test_a_part_done_twice_counts_once(address: str) -> None:
    manifest = Manifest.open(address, {})
    add(manifest, 0, 1)
    add(manifest, 0)
    manifest.finish()
    assert json.loads(Folder(address).read("_SUCCESS"))["parts"] == 2
    assert Folder(address).names("data") == ["part-000000.bin", "part-000001.bin"]


def test_a_record_says_what_its_files_are(address: str) -> None:
    manifest = Manifest.open(address, {})
    written = manifest.write_part("p", {"a": b"hello"}, rows=2, rejects=0, source="s", pictures=2.0)
    assert read_records(Folder(address)) == {"p": written}
    assert written.counts == {"pictures": 2.0}
    assert written.files == [FileRecord("a", 5, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")]


def test_a_part_stopped_before_its_record_is_done_again(tmp_path: Path) -> None:
    manifest = Manifest.open(str(tmp_path), {})
    manifest.folder.write("data/part-000000.bin", b"there, but not recorded")
    assert Manifest.open(str(tmp_path), {}).pending(["part-000000"]) == ["part-000000"]


def test_an_unfinished_or_missing_folder_is_refused_to_readers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist\. Run `raymuse pretokenize` to the end first"):
        read_finished(str(tmp_path / "none"), "pretokenize")
    add(Manifest.open(str(tmp_path / "half"), {}), 0)
    with pytest.raises(UserError, match="is not finished"):
        read_finished(str(tmp_path / "half"), "pretokenize")


# --- another config


def test_a_changed_config_is_refused_naming_fields_with_old_and_new_value(address: str) -> None:
    Manifest.open(address, {"seed": 1, "optimizer": {"lr": 0.1, "name": "adamw"}, "sizes": (1, 2)})
    Manifest.open(address, {"sizes": [1, 2], "optimizer": {"name": "adamw", "lr": 0.1}, "seed": 1})
    with pytest.raises(UserError) as caught:
        Manifest.open(address, {"seed": 2, "optimizer": {"lr": 0.2, "name": "adamw"}, "sizes": (1, 2), "new": "x"})
    assert str(caught.value) == (
        f"{address} was made with another config: new was None and is now 'x'; optimizer.lr was 0.1 and is now 0.2; "
        "seed was 1 and is now 2. Use the old values, or another output folder."
    )


def test_differing_says_nothing_of_equal_configs() -> None:
    assert differing({"a": {"b": 1}, "c": None}, {"a": {"b": 1}}) == []
    assert differing({"a": {"b": 1}}, {"a": 2}) == ["a was {'b': 1} and is now 2"]


# --- compaction


def part_names(*numbers: int) -> list[str]:
    return [f"part-{number:06d}" for number in numbers]


def index(address: str, number: int) -> list[str]:
    """Names of the parts of an index, in its order."""
    return [record["name"] for record in json.loads(Folder(address).read(f"_manifest/index-{number:06d}.json"))]


def test_compaction_leaves_few_objects_and_loses_nothing(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_EVERY", 10)
    order = [*range(20, 37), *range(20)]
    manifest = Manifest.open(address, {})
    add(manifest, *order)
    single = part_names(*range(13, 20))
    assert Folder(address).names("_manifest") == [
        "config.json",
        *(f"index-{number:06d}.json" for number in range(3)),
        "lock.json",
        *(f"{name}.json" for name in single),
    ]
    for number in range(3):
        assert index(address, number) == part_names(*order[10 * number : 10 * number + 10])
    again = Manifest.open(address, {})
    assert again.done == manifest.done
    assert list(again.done) == part_names(*range(37))
    add(again, *range(37, 45))
    assert index(address, 3) == [*single, *part_names(37, 38, 39)]
    again.finish()
    assert len(read_finished(address, "x")) == 45


def test_a_folder_with_the_one_index_of_older_versions_goes_on(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_EVERY", 3)
    add(Manifest.open(address, {}), 0, 1)
    folder = Folder(address)
    old = [json.loads(folder.read(f"_manifest/{name}.json")) for name in part_names(0, 1)]
    folder.write("_manifest/index.json", json.dumps([{**record, "rows": 99} for record in old]).encode())
    folder.remove("_manifest/part-000001.json")
    manifest = Manifest.open(address, {})
    assert [part.rows for part in manifest.done.values()] == [3, 99]
    add(manifest, 2, 1)
    assert index(address, 0) == part_names(0, 2, 1)
    assert [part.rows for part in Manifest.open(address, {}).done.values()] == [3, 3, 3]


@pytest.mark.parametrize("deleted", [0, 4, 10])
def test_a_compaction_stopped_half_way_changes_nothing(
    deleted: int, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPACT_EVERY", 10)
    manifest = Manifest.open(address, {})
    add(manifest, *range(9))
    remove = Folder.remove_files

    def stopped(self: Folder, names: list[str]) -> None:
        remove(self, names[:deleted])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove_files", stopped)
        with pytest.raises(KeyboardInterrupt):
            add(manifest, 9)
    assert read_records(Folder(address)) == manifest.done
    again = Manifest.open(address, {})
    assert list(again.done) == part_names(*range(10))
    add(again, 0, rows=7)  # done again, and so it counts in place of the index's
    add(again, *range(10, 30))
    rows = {name: part.rows for name, part in Manifest.open(address, {}).done.items()}
    assert rows == {**dict.fromkeys(part_names(*range(30)), 3), "part-000000": 7}
    assert sum(name.startswith("part-") for name in Folder(address).names("_manifest")) < 10


def test_a_commit_costs_the_same_however_many_there_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else 100,000 parts rewrite five million records, and each asks for a lock that nobody contests."""
    monkeypatch.setattr(module, "COMPACT_EVERY", 10)
    manifest = Manifest.open(str(tmp_path), {})
    add(manifest, *range(39))
    calls: list[tuple[str, ...]] = []
    write, remove = Folder.write, Folder.remove_files

    def counted_write(self: Folder, name: str, data: bytes) -> None:
        calls.append(("write", name))
        write(self, name, data)

    def counted_remove(self: Folder, names: list[str]) -> None:
        calls.append(("remove", *names))
        remove(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", lambda self, name: pytest.fail(f"a commit reads {name}"))
        patch.setattr(Folder, "write", counted_write)
        patch.setattr(Folder, "remove_files", counted_remove)
        add(manifest, 39, 40)
    assert calls == [
        ("write", "data/part-000039.bin"),
        ("write", "_manifest/part-000039.json"),
        ("write", "_manifest/index-000003.json"),
        ("remove", *(f"_manifest/{name}.json" for name in part_names(*range(30, 40)))),
        ("write", "data/part-000040.bin"),
        ("write", "_manifest/part-000040.json"),
    ]
    assert index(str(tmp_path), 3) == part_names(*range(30, 40))


def test_a_record_that_cannot_be_read_is_raised_or_told(address: str) -> None:
    add(Manifest.open(address, {}), 0, 1, 2)
    Folder(address).write("_manifest/part-000001.json", b"{")
    with pytest.raises(ValueError, match="Expecting"):
        read_records(Folder(address))
    problems: list[str] = []
    assert list(read_records(Folder(address), problems)) == part_names(0, 2)
    (problem,) = problems
    assert problem.startswith("_manifest/part-000001.json: it cannot be read: ")


# --- locks


def lock(folder: Path, **changes: Any) -> None:
    held = {"host": socket.gethostname(), "pid": os.getpid(), "expires": time.time() + 1000}
    Folder(str(folder)).write("_manifest/lock.json", json.dumps({**held, **changes}).encode())


def test_a_killed_writers_lock_neither_blocks_nor_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED_HOLDER, str(tmp_path)]).returncode == -9
    assert (tmp_path / "_manifest" / "lock.json").exists()
    add(Manifest.open(str(tmp_path), {}), 0)
    lock(tmp_path, host="elsewhere", expires=time.time() - 1)
    Manifest.open(str(tmp_path), {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"host": 1, "pid": "x"}'])
def test_a_damaged_lock_never_blocks(content: bytes, tmp_path: Path) -> None:
    Folder(str(tmp_path)).write("_manifest/lock.json", content)
    add(Manifest.open(str(tmp_path), {}), 0)


@pytest.mark.parametrize("who", ["another process here", "another machine"])
def test_a_live_second_writer_is_named_and_does_not_block(
    who: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if who == "another machine":
        lock(tmp_path, host="elsewhere", pid=77)
    else:
        lock(tmp_path, pid=os.getppid())
    add(Manifest.open(str(tmp_path), {}), 0)
    pid = 77 if who == "another machine" else os.getppid()
    warning = capsys.readouterr().err
    assert f"warning: process {pid} on" in warning
    assert str(tmp_path) in warning
    assert warning.count("\n") == 1


def test_a_lock_is_written_again_when_a_third_of_its_time_is_over(tmp_path: Path) -> None:
    manifest = Manifest.open(str(tmp_path), {})
    path = tmp_path / "_manifest" / "lock.json"
    first = json.loads(path.read_text())["expires"]
    assert first == pytest.approx(time.time() + 120, abs=20)
    add(manifest, 0)
    assert json.loads(path.read_text())["expires"] == first
    manifest._locked = time.monotonic() - 41
    add(manifest, 1)
    second = json.loads(path.read_text())["expires"]
    assert second > first
    add(manifest, 2)
    assert json.loads(path.read_text())["expires"] == second


def test_a_finished_folder_is_unlocked_once(tmp_path: Path) -> None:
    manifest = Manifest.open(str(tmp_path), {})
    manifest.finish()
    assert not (tmp_path / "_manifest" / "lock.json").exists()
    lock(tmp_path, host="elsewhere", expires=0)
    manifest.release()
    assert (tmp_path / "_manifest" / "lock.json").exists(), "it belongs to another by now"
    Manifest.open(str(tmp_path), {}).release()
    assert not (tmp_path / "_manifest" / "lock.json").exists()


def test_part_records_survive_json() -> None:
    part = PartRecord("p", 1, 2, "s", [FileRecord.of("f", b"1")], {"n": 1.0})
    plain = json.loads(json.dumps({**part.__dict__, "files": [file.__dict__ for file in part.files]}))
    assert PartRecord.parse(plain) == part
