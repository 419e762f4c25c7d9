"""Parquet, Arrow and Hugging Face data sets in: every row comes out once, in order, and a bad one costs only itself."""

import csv
import errno
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.storage import hub, sources
from raymuse.storage.images import Picture, Reading, Shard, estimate_rows, list_shards, read_shard
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.picture_scan import PictureScan
from raymuse.storage.places import Place
from raymuse.storage.rejects import Reject
from raymuse.storage.webdataset_writer import encode, write_shard

AS_IS = Reading()


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels))


PNGS = [png(seed) for seed in range(30)]


def write_parquet(path: Path, columns: dict[str, Any], rows_per_group: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def plain(count: int, start: int = 0) -> dict[str, Any]:
    numbers = range(start, start + count)
    return {"image": [PNGS[number] for number in numbers], "caption": [f"caption {number}" for number in numbers]}


def rows_of(address: str | Path | list[str], reading: Reading = AS_IS, **options: int) -> list[Picture | Reject]:
    where = address if isinstance(address, list) else str(address)
    shards = list_shards(where, reading=reading, **options)
    return [row for shard in shards for row in read_shard(shard, reading)]


def pictures(address: str | Path | list[str], reading: Reading = AS_IS, **options: int) -> list[Picture]:
    rows = rows_of(address, reading, **options)
    assert all(isinstance(row, Picture) for row in rows), rows
    return [row for row in rows if isinstance(row, Picture)]


def said(rows: list[Picture]) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(row.data, row.captions) for row in rows]


def move(folder: Path, address: str) -> None:
    """Copy the files directly inside a folder to a store."""
    store, root = fsspec.core.url_to_fs(address)
    store.pipe({f"{root}/{path.name}": path.read_bytes() for path in folder.iterdir()})


def names(address: str | Path | list[str], **options: int) -> list[str]:
    where = address if isinstance(address, list) else str(address)
    return [shard.name for shard in list_shards(where, **options)]


# --- Parquet: what a column may hold


def as_bytes(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    return "image", pa.array(data, pa.large_binary())


def as_struct(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    return "odd name", [{"bytes": one, "path": "elsewhere.png"} for one in data]


def as_paths(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    for number, one in enumerate(data):
        (folder / "deep").mkdir(parents=True, exist_ok=True)
        (folder / f"deep/{number}.png").write_bytes(one)
    return "file_name", [f"deep/{number}.png" for number in range(len(data))]


def as_absolute_paths(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    _, paths = as_paths(folder, data)
    return "path", pa.array([str(folder / path) for path in paths]).dictionary_encode()


def as_struct_of_paths(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    _, paths = as_paths(folder, data)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return "image", pa.array([{"bytes": None, "path": path} for path in paths], kind)


def as_struct_of_nulls(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    _, paths = as_paths(folder, data)
    return "image", [{"bytes": None, "path": path} for path in paths]


def as_addresses(folder: Path, data: list[bytes]) -> tuple[str, Any]:
    fsspec.filesystem("memory").pipe({f"/pictures/{number}.png": one for number, one in enumerate(data)})
    return "webp", pa.array([f"memory://pictures/{number}.png" for number in range(len(data))], pa.string_view())


@pytest.mark.parametrize(
    "column", [as_bytes, as_struct, as_paths, as_absolute_paths, as_struct_of_paths, as_struct_of_nulls, as_addresses]
)
def test_pictures_are_bytes_structs_or_addresses(
    column: Callable[[Path, list[bytes]], tuple[str, Any]], tmp_path: Path
) -> None:
    name, values = column(tmp_path / "pictures", PNGS[:5])
    path = write_parquet(tmp_path / "pictures/a.parquet", {name: values, "text": [f"t{n}" for n in range(5)]})
    assert said(pictures(path)) == [(PNGS[number], (f"t{number}",)) for number in range(5)]


@pytest.mark.parametrize(
    ("values", "captions"),
    [
        (["a", "b"], [("a",), ("b",)]),
        (pa.array(["a", "b"], pa.large_string()), [("a",), ("b",)]),
        (pa.array(["a", "b"], pa.string_view()), [("a",), ("b",)]),
        (pa.array([b"a", b"b"]), [("a",), ("b",)]),
        (pa.array(["a", "b"]).dictionary_encode(), [("a",), ("b",)]),
        ([["a", None, "b", "a", " "], ["c"]], [("a", "b"), ("c",)]),
        (pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)), [("a", "b"), ("c", "d")]),
        (pa.array([["a"], ["b"]], pa.large_list(pa.large_string())), [("a",), ("b",)]),
    ],
)
def test_captions_are_text_or_lists_of_text(values: Any, captions: list[tuple[str, ...]], tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"jpg": PNGS[:2], "prompt": values})
    assert [row.captions for row in pictures(path)] == captions


def test_other_columns_are_metadata_and_the_key_column_gives_the_key(tmp_path: Path) -> None:
    more = {
        "width": [512, None],
        "aesthetic": [6.5, float("nan")],
        "language": ["en", "de"],
        "ok": [True, False],
        "embedding": [[0.5], [0.5]],
        "txt": ["not", "these"],
    }
    table = {**plain(2), **more}
    for key, values in {"key": ["x/1", "猫"], "__key__": ["x/1", "猫"], "id": [7, 8]}.items():
        rows = pictures(write_parquet(tmp_path / f"{key}.parquet", {**table, key: values}))
        assert [row.key for row in rows] == [str(value) for value in values]
        assert [row.metadata for row in rows] == [
            {"width": 512, "aesthetic": 6.5, "language": "en", "ok": True, "txt": "not"},
            {"language": "de", "ok": False, "txt": "these"},
        ]
    rows = pictures(write_parquet(tmp_path / "none.parquet", table))
    assert [row.key for row in rows] == ["none-000000", "none-000001"]


def test_named_columns_win_and_wrong_ones_are_refused_with_those_there_are(tmp_path: Path) -> None:
    columns = {**plain(2), "thumbnail": [PNGS[8], PNGS[9]], "blip": ["made", "up"], "score": [1.0, 2.0]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    reading = Reading(image_column="thumbnail", caption_column="blip", caption_prefix="a photo of ")
    assert said(pictures(path, reading)) == [(PNGS[8], ("a photo of made",)), (PNGS[9], ("a photo of up",))]
    there = "it has image, caption, thumbnail, blip, score"
    for wrong, message in (
        (Reading(image_column="img"), rf"a\.parquet has no column 'img' \(image_column\); {there}"),
        (Reading(caption_column="text"), rf"a\.parquet has no column 'text' \(caption_column\); {there}"),
        (Reading(image_column="score"), r"the column 'score' \(image_column\) holds double, and not bytes"),
        (Reading(caption_column="score"), r"the column 'score' \(caption_column\) holds double, and not text"),
    ):
        with pytest.raises(UserError, match=message):
            list_shards(str(path), reading=wrong)
    write_parquet(tmp_path / "b.parquet", {"photo": [PNGS[0]], "words": ["x"]})
    with pytest.raises(UserError, match=r"no column of text.*it has photo, words\. Name one: caption_column="):
        list_shards(str(tmp_path))


# --- Parquet: bad rows


def test_a_bad_row_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.png").write_bytes(PNGS[0])
    table = {
        "key": ["good", "no-bytes", "null", "empty", "gone", "folder", "long", "nul", "good", None, "last", "last-2"],
        "image": pa.array(
            [
                {"bytes": PNGS[1], "path": None},
                {"bytes": None, "path": None},
                None,
                {"bytes": b"", "path": None},
                {"bytes": None, "path": "gone.png"},
                {"bytes": None, "path": "folder.png"},
                {"bytes": None, "path": "x" * 5000},
                {"bytes": None, "path": "a\0b.png"},
                {"bytes": PNGS[2], "path": None},
                {"bytes": PNGS[3], "path": None},
                {"bytes": None, "path": "good.png"},
                {"bytes": None, "path": "unheard-of://x.png"},
            ],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "caption": ["c"] * 12,
    }
    path = write_parquet(tmp_path / "a.parquet", table)
    rows = rows_of(path)
    assert [(row.key, row.reason.value if isinstance(row, Reject) else "picture") for row in rows] == [
        ("good", "picture"),
        ("no-bytes", "no_picture"),
        ("null", "no_picture"),
        ("empty", "no_picture"),
        ("gone", "unreadable"),
        ("folder", "unreadable"),
        ("long", "unreadable"),
        ("nul", "unreadable"),
        ("good", "duplicate_key"),
        ("a-000009", "picture"),
        ("last", "picture"),
        ("last-2", "unreadable"),
    ]
    assert {row.source for row in rows if isinstance(row, Reject)} == {"a.parquet"}


def test_a_bad_caption_costs_only_its_row(tmp_path: Path) -> None:
    odd = pa.array([b"good", b"caf\xe9", None, b" \n", b"nu\0l", b"last"]).view(pa.string())
    table = {"image": PNGS[:6], "caption": odd, "note": odd}
    path = write_parquet(tmp_path / "a.parquet", table)
    reasons = [row.reason.value if isinstance(row, Reject) else row.captions[0] for row in rows_of(path)]
    assert reasons == ["good", "bad_caption_encoding", "no_caption", "no_caption", "nul", "last"]
    repaired = rows_of(path, Reading(repair_captions=True))
    assert isinstance(repaired[1], Picture)
    assert (repaired[1].captions, repaired[1].notes) == (("café",), ("captions_repaired",))
    assert isinstance(repaired[4], Picture)
    assert repaired[4].notes == ("captions_cleaned",)
    offsets = pa.array([0, 2, 2, 4, 5, 6, 6], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, odd, mask=pa.array([False, False, False, False, False, True]))
    rows = rows_of(write_parquet(tmp_path / "lists.parquet", {"image": PNGS[:6], "captions": lists}))
    assert [row.reason.value if isinstance(row, Reject) else row.captions for row in rows] == [
        "bad_caption_encoding", "no_caption", "no_caption", ("nul",), ("last",), "no_caption",
    ]  # fmt: skip


def test_a_damaged_file_is_one_reject_and_the_others_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", plain(3))
    write_parquet(tmp_path / "c.parquet", plain(3, 3))
    for damaged in (b"", b"<html>404</html>" * 99, (tmp_path / "a.parquet").read_bytes()[:-9]):
        (tmp_path / "b.parquet").write_bytes(damaged)
        rows = rows_of(tmp_path)
        (lost,) = [row for row in rows if isinstance(row, Reject)]
        assert (lost.source, lost.key, lost.reason.value) == ("b.parquet", "", "shard_unreadable")
        assert [row.key for row in rows] == [
            "a-000000", "a-000001", "a-000002", "", "c-000000", "c-000001", "c-000002",
        ]  # fmt: skip
    with pytest.raises(UserError, match=r"no Parquet file can be read; b\.parquet"):
        list_shards(str(tmp_path / "b.parquet"))


def test_a_damaged_row_group_costs_its_own_rows_only(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", plain(30), rows_per_group=5)
    column = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    rows = rows_of(path, images_per_shard=15)
    (lost,) = [row for row in rows if isinstance(row, Reject)]
    assert lost.reason.value == "shard_damaged"
    assert "rows 10 to 14 (row group 2)" in lost.detail
    kept = [row.key for row in rows if isinstance(row, Picture)]
    assert kept == [f"a-{number:06d}" for number in range(30) if number not in range(10, 15)]


def test_a_file_that_changed_or_vanished_since_the_plan_is_one_reject(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", plain(20), rows_per_group=5)
    shards = list_shards(str(path), images_per_shard=10)
    write_parquet(path, plain(20), rows_per_group=4)
    changed = [row for shard in shards for row in read_shard(shard)]
    assert [row.reason.value for row in changed if isinstance(row, Reject)] == ["shard_unreadable"] * 2
    path.unlink()
    gone = [row for shard in shards for row in read_shard(shard)]
    assert [row.reason.value for row in gone if isinstance(row, Reject)] == ["shard_unreadable"] * 2


class Slow(io.BytesIO):
    """A remote file whose network fails after the footer was read."""

    broken = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.broken:
            raise TimeoutError("slow store")
        return super().read(size)


def test_a_failing_network_is_raised_and_no_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_parquet(tmp_path / "a.parquet", plain(20), rows_per_group=5).read_bytes()
    fsspec.filesystem("memory").pipe({"/net/a.parquet": data})
    (shard,) = list_shards("memory://net/a.parquet")
    stream = Slow(data)
    monkeypatch.setattr(sources, "open_in_parts", lambda address: stream)
    rows = read_shard(shard)
    assert isinstance(next(rows), Picture)
    stream.broken = True
    with pytest.raises(TimeoutError):
        list(rows)
    stream = Slow(data)
    stream.broken = True
    with pytest.raises(TimeoutError):
        list(read_shard(shard))


@pytest.mark.parametrize(
    "error",
    [PermissionError("The provided token has expired."), OSError("Forbidden: the token was taken back")],
    ids=["as s3fs says it", "as gcsfs says it"],
)
def test_a_store_that_refuses_is_raised_and_no_reject(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials that expire would else make of every row that is still to come a reject, for good."""
    write_tars(tmp_path / "tars", [2])
    write_parquet(tmp_path / "tables/a.parquet", plain(4))
    data_set(4).save_to_disk(tmp_path / "saved")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/a.png").write_bytes(PNGS[0])
    (tmp_path / "loose/a.txt").write_bytes(b"a caption")
    for kind in ("tars", "tables", "saved", "loose"):
        move(tmp_path / kind, f"memory://refusing/{kind}")
    named = write_parquet(tmp_path / "named.parquet", {"path": ["memory://refusing/loose/a.png"], "text": ["x"]})
    addresses = [*(f"memory://refusing/{kind}" for kind in ("tars", "tables", "saved", "loose")), str(named)]
    shards = [shard for address in addresses for shard in list_shards(address)]
    assert len(shards) == 5
    assert all(isinstance(row, Picture) for shard in shards for row in read_shard(shard))

    def refuse(*args: object, **options: object) -> None:
        raise error

    for name in ("info", "_open", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, name, refuse)
    for shard in shards:
        with pytest.raises(type(error), match="token"):
            list(read_shard(shard))


def test_a_store_that_refuses_while_a_plan_is_made_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "tables/a.parquet", plain(4))
    move(tmp_path / "tables", "memory://listed")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("The provided token has expired.")

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    with pytest.raises(UserError, match=r"^memory://listed may not be read: The provided token .* the credentials\.$"):
        list_shards("memory://listed")


def test_a_forbidden_file_on_a_disk_is_one_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be root, to whom nothing is forbidden: opening fails here as it would for others."""
    write_tars(tmp_path / "tars", [2, 1])
    (tmp_path / "loose").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "loose" / name).write_bytes(PNGS[0])
    opened = Path.open

    def forbid(self: Path, *args: Any, **options: Any) -> Any:
        if self.name in ("00000.tar", "a.png"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", forbid)
    for folder, expected in (("tars", ["shard_unreadable", "k0"]), ("loose", ["unreadable", "b"])):
        rows = rows_of(tmp_path / folder)
        assert [row.reason.value if isinstance(row, Reject) else row.key for row in rows] == expected


# --- Parquet: plans


def test_row_groups_are_gathered_and_never_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", plain(28), rows_per_group=4)
    assert names(path) == ["a.parquet"]
    assert names(path, images_per_shard=10) == [
        "a.parquet:0-7", "a.parquet:8-15", "a.parquet:16-23", "a.parquet:24-27",
    ]  # fmt: skip
    assert len(names(path, images_per_shard=1)) == 7
    whole = pictures(path)
    for size in (1, 4, 10, 1000):
        assert pictures(path, images_per_shard=size) == whole  # keys too: they are numbered in the file
    shards = list_shards(str(path), images_per_shard=10)
    assert pickle.loads(pickle.dumps(shards)) == shards == list_shards(str(path), images_per_shard=10)


def test_folders_globs_and_ranges_of_parquet(tmp_path: Path) -> None:
    for number in range(3):
        write_parquet(tmp_path / f"data/train-{number:05d}-of-00003.parquet", plain(4, 4 * number))
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", plain(2, 20))
    (tmp_path / "README.md").write_bytes(b"x")
    train = [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert names(tmp_path) == ["data/test-00000-of-00001.parquet", *(f"data/{name}" for name in train)]
    for pattern in ("data/train-*.parquet", "data/train-{00000..00002}-of-00003.parquet"):
        assert names(tmp_path / pattern) == train
        assert said(pictures(tmp_path / pattern)) == [(PNGS[n], (f"caption {n}",)) for n in range(12)]
    with pytest.raises(UserError, match=r"nothing at .*train-00003-of-00003\.parquet"):
        names(tmp_path / "data/train-{00000..00003}-of-00003.parquet")
    with pytest.raises(UserError, match="End the pattern with"):
        names(tmp_path / "*")
    move(tmp_path / "data", "memory://moved")
    assert names("memory://moved") == names(tmp_path / "data")
    assert names("memory://moved/train-{00000..00002}-of-00003.parquet") == train


def test_loose_pictures_beside_parquet(tmp_path: Path) -> None:
    """img2dataset's `files` layout has both: the pictures count, since they bring their captions."""
    write_parquet(tmp_path / "00000.parquet", {"key": ["000"], "url": ["x"], "caption": ["c"]})
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/000.png").write_bytes(PNGS[0])
    with pytest.raises(UserError, match=r"Parquet files and loose pictures\. Name one kind"):
        list_shards(str(tmp_path))
    (tmp_path / "00000/000.txt").write_bytes(b"a caption")
    assert said(pictures(tmp_path)) == [(PNGS[0], ("a caption",))]


def test_parquet_without_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    with pytest.raises(UserError, match="have no rows"):
        list_shards(str(tmp_path))


@pytest.mark.parametrize("rows_per_group", [4, 1000])
def test_memory_is_bounded_whatever_the_file(rows_per_group: int, tmp_path: Path) -> None:
    """96 MiB of noise, in many row groups or in many pages of one: never more than a few rows are held."""
    draw = np.random.default_rng(0)
    table = pa.table({"image": [draw.bytes(1 << 20) for _ in range(96)], "text": ["x"] * 96})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=rows_per_group, write_batch_size=4)
    code = (
        "import sys, pyarrow as pa\n"
        "from raymuse.storage.images import list_shards, read_shard\n"
        "rows = 0\n"
        "for shard in list_shards(sys.argv[1]):\n"
        "    for row in read_shard(shard):\n"
        "        rows += len(row.data) == 1 << 20\n"
        "print(rows, pa.default_memory_pool().max_memory() >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 96
    assert peak < 48, f"{peak} MiB"


# --- Arrow


def data_set(count: int, start: int = 0) -> datasets.Dataset:
    numbers = range(start, start + count)
    columns = {
        "image": [{"bytes": PNGS[number], "path": None} for number in numbers],
        "caption": [f"caption {number}" for number in numbers],
        "label": list(numbers),
    }
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string"), "label": datasets.Value("int64")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def write_stream(path: Path, count: int, rows_per_batch: int) -> bytes:
    """A saved data set of one file with so many rows a record batch; its bytes."""
    table = pa.table({**plain(count), "width": list(range(count))})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    state = {"_data_files": [{"filename": path.name}], "_split": None}
    (path.parent / "state.json").write_text(json.dumps(state))
    return path.read_bytes()


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    data_set(25).save_to_disk(tmp_path / "saved", num_shards=2)
    rows = pictures(tmp_path / "saved")
    assert said(rows) == [(PNGS[number], (f"caption {number}",)) for number in range(25)]
    assert [row.metadata for row in rows] == [{"label": number} for number in range(25)]
    assert names(tmp_path / "saved") == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert rows[13].key == "data-00001-of-00002-000000"
    reloaded = datasets.load_from_disk(str(tmp_path / "saved"))
    theirs = [(np.asarray(row["image"]).tolist(), row["caption"]) for row in reloaded]
    ours = [(np.asarray(Image.open(io.BytesIO(row.data))).tolist(), row.captions[0]) for row in rows]
    assert ours == theirs


def test_a_split_is_chosen(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": data_set(4), "validation": data_set(2, 10)})
    both.save_to_disk(tmp_path / "saved")
    assert len(pictures(tmp_path / "saved")) == 4
    assert said(pictures(tmp_path / "saved", Reading(split="validation")))[0] == (PNGS[10], ("caption 10",))
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, validation\. Name one"):
        list_shards(str(tmp_path / "saved"), reading=Reading(split="test"))


def test_record_batches_are_gathered_into_shards(tmp_path: Path) -> None:
    write_stream(tmp_path / "d/data.arrow", 30, rows_per_batch=4)
    assert names(tmp_path / "d", images_per_shard=12) == [
        "data.arrow:0-11", "data.arrow:12-23", "data.arrow:24-29",
    ]  # fmt: skip
    whole = pictures(tmp_path / "d")
    assert said(whole) == [(PNGS[number], (f"caption {number}",)) for number in range(30)]
    for size in (1, 12, 17):
        assert pictures(tmp_path / "d", images_per_shard=size) == whole


def test_every_cut_of_an_arrow_file_salvages_the_batches_before_it(tmp_path: Path) -> None:
    data = write_stream(tmp_path / "d/data.arrow", 12, rows_per_batch=3)
    whole = pictures(tmp_path / "d")
    stream = pa.BufferReader(data)
    ends = [stream.tell() for _ in pa.ipc.open_stream(stream)]
    assert len(ends) == 4
    for stop in range(0, len(data) - 1, 61):
        (tmp_path / "d/data.arrow").write_bytes(data[:stop])
        kept = 3 * sum(end <= stop for end in ends)
        for size in (1000, 3):
            if kept == 0:
                with pytest.raises(UserError, match="no Arrow file can be read"):
                    list_shards(str(tmp_path / "d"), images_per_shard=size)
                continue
            *rows, lost = rows_of(tmp_path / "d", images_per_shard=size)
            assert rows == whole[:kept]
            assert isinstance(lost, Reject)
            assert lost.reason.value in ("shard_damaged", "truncated")
    (tmp_path / "d/data.arrow").write_bytes(data[: ends[-1]])  # whole batches, but no mark of the end
    lost = rows_of(tmp_path / "d")[-1]
    assert isinstance(lost, Reject)
    assert lost.reason.value == "truncated"


def test_one_unreadable_arrow_file_is_one_reject(tmp_path: Path) -> None:
    data_set(9).save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved/data-00001-of-00003.arrow").write_bytes(b"<html>")
    rows = rows_of(tmp_path / "saved")
    assert [(row.source, row.reason.value) for row in rows if isinstance(row, Reject)] == [
        ("data-00001-of-00003.arrow", "shard_unreadable")
    ]
    assert len(rows) == 7
    (tmp_path / "saved/data-00002-of-00003.arrow").unlink()
    assert [row.reason.value for row in rows_of(tmp_path / "saved") if isinstance(row, Reject)] == [
        "shard_unreadable", "shard_unreadable",
    ]  # fmt: skip


def test_a_saved_data_set_in_a_store(tmp_path: Path) -> None:
    data_set(9).save_to_disk(tmp_path / "saved", num_shards=2)
    move(tmp_path / "saved", "memory://saved-data")
    assert said(pictures("memory://saved-data")) == said(pictures(tmp_path / "saved"))
    assert estimate_rows(list_shards("memory://saved-data")) in range(7, 12)
    whole = fsspec.filesystem("memory").cat_file("/saved-data/data-00001-of-00002.arrow")
    fsspec.filesystem("memory").pipe({"/saved-data/data-00001-of-00002.arrow": whole[:-8]})
    assert [row.reason.value for row in rows_of("memory://saved-data") if isinstance(row, Reject)] == ["truncated"]


@pytest.mark.parametrize("state", [b"{", b"{}", b"[]"])
def test_a_broken_index_of_a_saved_data_set_says_what_to_do(state: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(state)
    with pytest.raises(UserError, match=r"state\.json is not as `Dataset\.save_to_disk` writes it"):
        list_shards(str(tmp_path))


# --- Hugging Face


def write_imagefolder(folder: Path, table: str) -> None:
    (folder / "train").mkdir(parents=True)
    rows = []
    for number in range(6):
        name = f"{number}.png"
        (folder / "train" / name).write_bytes(PNGS[number])
        rows.append({"file_name": name, "text": f'caption, "{number}"', "score": number})
    path = folder / "train" / table
    if table.endswith(".csv"):
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_an_imagefolder_reads_as_datasets_reads_it(table: str, tmp_path: Path) -> None:
    write_imagefolder(tmp_path, table)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", streaming=True)
    expected = {(np.asarray(row["image"]).tobytes(), row["text"], row["score"]) for row in theirs}
    ours = {
        (np.asarray(Image.open(io.BytesIO(row.data))).tobytes(), row.captions[0], row.metadata["score"])
        for row in pictures(tmp_path)
    }
    assert ours == expected
    assert len(ours) == 6


def hub_rows(folder: Path, reading: Reading = AS_IS) -> list[list[Picture | Reject]]:
    """The rows of every shard that the `datasets` library streams out of a local folder."""
    shards = hub.list_shards(Place(str(folder), "data set", ""), 1000, reading)
    return [list(read_shard(shard, reading)) for shard in shards]


def test_a_repository_of_parquet_is_streamed_a_shard_a_file(tmp_path: Path) -> None:
    for number in range(3):
        data_set(4, 4 * number).to_parquet(tmp_path / f"data/train-{number:05d}-of-00003.parquet")
    data_set(2, 20).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    shards = hub_rows(tmp_path)
    assert [[row.key for row in rows] for rows in shards] == [
        [f"train-{shard:05d}-{row:06d}" for row in range(4)] for shard in range(3)
    ]
    rows = [row for rows in shards for row in rows if isinstance(row, Picture)]
    assert said(rows) == [(PNGS[number], (f"caption {number}",)) for number in range(12)]  # the same bytes: not decoded
    assert rows[5].metadata == {"label": 5}
    assert said(rows) == said(pictures(tmp_path / "data/train-*.parquet"))
    (test,) = hub_rows(tmp_path, Reading(split="test", caption_prefix="> "))
    assert [row.captions for row in test if isinstance(row, Picture)] == [("> caption 20",), ("> caption 21",)]
    shards_ = hub.list_shards(Place(str(tmp_path), "data set", ""), 1000, AS_IS)
    assert pickle.loads(pickle.dumps(shards_)) == shards_
    assert estimate_rows(shards_) is None
    second = [replace(shard, name=f"1/{shard.name}") for shard in shards_]  # as one of several inputs
    keys = [[row.key for row in read_shard(shard)] for shard in second]
    assert keys == [[row.key for row in rows] for rows in shards]
    data_set(1).to_parquet(tmp_path / "data/train-00003-of-00003.parquet")
    with pytest.raises(UserError, match="had 3 shards when the plan was made and now has 4"):
        list(read_shard(shards_[0]))


def test_a_repository_of_pictures_is_streamed(tmp_path: Path) -> None:
    write_imagefolder(tmp_path, "metadata.jsonl")
    rows = [row for rows in hub_rows(tmp_path) for row in rows if isinstance(row, Picture)]
    assert sorted(said(rows)) == sorted(said(pictures(tmp_path)))
    assert len(rows) == 6


def test_a_bad_row_of_a_streamed_data_set_costs_only_itself(tmp_path: Path) -> None:
    table = {
        "image": pa.array(
            [{"bytes": PNGS[0], "path": None}, None, {"bytes": b"no picture", "path": None}, {"bytes": PNGS[1]}],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        "caption": ["a", "b", "c", None],
    }
    write_parquet(tmp_path / "train.parquet", table)
    (rows,) = hub_rows(tmp_path)
    assert [row.reason.value if isinstance(row, Reject) else row.data for row in rows] == [
        PNGS[0], "no_picture", b"no picture", "no_caption",
    ]  # fmt: skip


def test_a_streamed_data_set_that_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set(2).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"split nope\) cannot be opened.*train"):
        hub_rows(tmp_path, Reading(split="nope"))
    with pytest.raises(UserError, match=r"no column 'words' \(caption_column\); it has image, caption, label"):
        hub_rows(tmp_path, Reading(caption_column="words"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'needs the package `datasets`.*pip install "raymuse\[hf\]"'):
        list_shards("hf://datasets/someone/something")


def test_a_hub_that_cannot_be_reached_is_one_sentence() -> None:
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from raymuse.config.errors import UserError\n"
        "from raymuse.storage.images import list_shards\n"
        "try:\n"
        "    list_shards('hf://datasets/someone/something')\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.strip().splitlines()
    assert "hf://datasets/someone/something (split train) cannot be opened" in line
    assert line.endswith("or download the data set where that is possible and give its folder.")


def test_which_addresses_are_data_sets() -> None:
    assert hub.is_data_set("hf://datasets/owner/name")
    assert hub.is_data_set("hf://datasets/owner/name@v1.0/")
    for other in ("hf://datasets/owner/name/data/*.parquet", "hf://owner/name", "hf://datasets/name", "owner/name"):
        assert not hub.is_data_set(other)


# --- several kinds


def write_tars(folder: Path, counts: list[int]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, count in enumerate(counts):
        drawn = (Image.open(io.BytesIO(PNGS[one])) for one in range(count))
        write_shard(folder / f"{number:05d}.tar", ((f"k{i}", image, f"c{i}", {}) for i, image in enumerate(drawn)))
    return str(folder)


def test_several_sources_in_one_plan(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", [2, 2])
    tables = str(write_parquet(tmp_path / "tables/00000.parquet", plain(3)).parent)
    assert names([tars, tables, tars]) == [
        "0/00000.tar", "0/00001.tar", "1/00000.parquet", "2/00000.tar", "2/00001.tar",
    ]  # fmt: skip
    assert names([tars]) == names(tars) == ["00000.tar", "00001.tar"]
    assert len(pictures([tars, tables])) == 7
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"/empty is empty\."):
        list_shards([tars, str(tmp_path / "empty")])
    (tmp_path / "tables/00000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="tables: no Parquet file can be read"):
        list_shards([tars, tables])
    bad = [row for row in rows_of([tars, write_tars(tmp_path / "more", [1])]) if isinstance(row, Reject)]
    assert bad == []


def test_rows_are_estimated_without_reading_everything(tmp_path: Path) -> None:
    tars = list_shards(write_tars(tmp_path / "tars", [10, 10, 20]))
    assert estimate_rows(tars) in range(36, 45)
    tables = list_shards(str(write_parquet(tmp_path / "a.parquet", plain(25), 4)), images_per_shard=8)
    assert estimate_rows(tables) == 25
    data_set(12).save_to_disk(tmp_path / "saved", num_shards=5)
    assert estimate_rows(list_shards(str(tmp_path / "saved"))) == 12
    (tmp_path / "loose").mkdir()
    for number in range(3):
        (tmp_path / f"loose/{number}.png").write_bytes(PNGS[number])
    loose = list_shards(str(tmp_path / "loose"))
    assert estimate_rows(loose) == 3
    assert estimate_rows([*tables, *loose]) == 28
    assert estimate_rows([*tables, Shard("train-00000", "hf://datasets/a/b", "hub", piece=(0, 1))]) is None


def test_random_access_is_refused_where_there_is_none_and_a_scan_gives_the_same(tmp_path: Path) -> None:
    shards = list_shards(str(write_parquet(tmp_path / "a.parquet", plain(20), 3)), images_per_shard=6)
    with pytest.raises(UserError, match=r"\(parquet\)\. Turn it into tars first: `raymuse data source="):
        PictureIndex(shards)
    tars = list_shards(write_tars(tmp_path / "tars", [3, 4]))
    index, scan = PictureIndex(tars), PictureScan(tars)
    chosen = [0, 2, 3, 6]
    assert [index.key(n) for n in range(7)] == [scan.key(n) for n in range(7)]
    assert said(list(index.take(chosen))) == said(list(scan.take(chosen)))
    scan = pickle.loads(pickle.dumps(PictureScan(shards)))
    assert len(scan) == 20
    assert [row.captions[0] for row in scan.take([1, 7, 19])] == ["caption 1", "caption 7", "caption 19"]


def test_an_unknown_protocol_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        list_shards("unheard-of://bucket/x.tar")

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r'Install s3fs to access S3\): pip install "raymuse\[s3\]"'):
        list_shards("s3://bucket/x.tar")
