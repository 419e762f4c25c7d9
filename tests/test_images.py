"""Captioned pictures in and out: every key of the input comes out exactly once, whatever state it is in."""

import csv
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.storage.images import Picture, Shard, list_shards, read_shard
from raymuse.storage.picture_index import PictureIndex
from raymuse.storage.rejects import REJECTS_SCHEMA, Reason, Reject, Unreadable, to_table
from raymuse.storage.webdataset_writer import encode, write_shard, write_tar


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


PNG = encode(picture())


def sample(key: str, caption: str | bytes = "a cat", **metadata: object) -> list[tuple[str, bytes]]:
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [(f"{key}.png", PNG), (f"{key}.txt", text), (f"{key}.json", json.dumps(metadata).encode())]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def rows_of(address: str | Path, **options: int) -> list[Picture | Reject]:
    return [row for shard in list_shards(str(address), **options) for row in read_shard(shard)]


def reasons(rows: list[Picture | Reject]) -> dict[str, str]:
    return {row.key: row.reason.value if isinstance(row, Reject) else "picture" for row in rows}


def tar_rows(path: Path, members: list[tuple[str, bytes]]) -> list[Picture | Reject]:
    write_tar(path, members)
    return rows_of(path)


# --- tars


def test_a_tar_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    images = [picture(seed) for seed in range(5)]
    count = write_shard(path, ((f"{i:09d}", im, f"caption {i}", {"aesthetic": 5.5}) for i, im in enumerate(images)))
    rows = [row for row in rows_of(path) if isinstance(row, Picture)]
    assert count == len(rows) == 5
    for number, row in enumerate(rows):
        assert (row.key, row.captions) == (f"{number:09d}", (f"caption {number}",))
        assert row.metadata["aesthetic"] == 5.5
        assert row.metadata["original_width"] == 16
        assert row.metadata["status"] == "success"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(row.data))), np.asarray(images[number]))


def test_writing_twice_writes_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [("k", picture(), "naïve 猫", {"width": 3, "b": 1, "a": 2})])
        time.sleep(0.01)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_a_failed_write_leaves_the_old_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [("k", picture(), "old", {})])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="twice"):
        write_shard(path, [("k", picture(), "new", {}), ("k", picture(), "new", {})])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "../x", "/x", "a//b"])
def test_the_writer_refuses_keys_that_do_not_read_back(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shard(tmp_path / "a.tar", [(key, picture(), "x", {})])


def test_what_we_write_webdataset_reads(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shard(tmp_path / "a.tar", [(f"k{i}", picture(), f"c{i}", {}) for i in range(3)])
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(one["__key__"], one["txt"].decode()) for one in read] == [(f"k{i}", f"c{i}") for i in range(3)]


def test_bad_samples_do_not_lose_their_neighbours(tmp_path: Path) -> None:
    rows = tar_rows(
        tmp_path / "a.tar",
        [
            *sample("good"),
            ("nocaption.png", PNG),
            ("nopicture.txt", b"x"),
            *sample("latin", "caf\xe9".encode("latin-1")),
            *sample("blank", "  \n"),
            *sample("good", "again"),
            ("foreign.heic", b"x"),
            ("foreign.txt", b"x"),
            ("badjson.png", PNG),
            ("badjson.txt", b"x"),
            ("badjson.json", b"{not json"),
            ("listjson.png", PNG),
            ("listjson.json", b"[1]"),
            ("._good2.png", b"macOS leaves these"),
            ("__meta__", b"webdataset leaves these"),
            ("README", b"no ending"),
            *sample("../../etc/passwd"),
            *sample("naïve/猫"),
            *sample("last"),
        ],
    )
    assert [(row.key, row.reason.value if isinstance(row, Reject) else "picture") for row in rows] == [
        ("good", "picture"),
        ("nocaption", "no_caption"),
        ("nopicture", "no_picture"),
        ("latin", "bad_caption_encoding"),
        ("blank", "no_caption"),
        ("good", "duplicate_key"),
        ("foreign", "unsupported_format"),
        ("badjson", "bad_metadata"),
        ("listjson", "bad_metadata"),
        ("README", "no_picture"),
        ("../../etc/passwd", "picture"),
        ("naïve/猫", "picture"),
        ("last", "picture"),
    ]


def test_captions_come_from_text_or_json_and_may_be_several(tmp_path: Path) -> None:
    def one(**members: bytes) -> tuple[str, ...]:
        path = tmp_path / "one.tar"
        (row,) = tar_rows(path, [("k.PNG", PNG), *((f"k.{name}", data) for name, data in members.items())])
        assert isinstance(row, Picture), row
        return row.captions

    assert one(txt="\ufeffbyte order mark\n".encode()) == ("byte order mark",)
    assert one(json=b'{"caption": "from json"}') == ("from json",)
    assert one(json=b'{"caption": "raw"}', txt=b"cleaned") == ("cleaned",)
    assert one(json=b'{"captions": ["a", "b", "a", ""]}', txt=b"c") == ("a", "b")


def test_a_lone_surrogate_in_json_is_refused_and_reported_as_valid_text(tmp_path: Path) -> None:
    (row,) = tar_rows(tmp_path / "a.tar", [("k.png", PNG), ("k.json", b'{"caption": "\\ud800"}')])
    assert isinstance(row, Reject)
    assert row.reason is Reason.BAD_CAPTION_ENCODING
    assert to_table([row, Reject("s", "\udce9", Reason.NO_CAPTION, "\udce9")]).schema == REJECTS_SCHEMA


def test_members_of_a_key_need_not_be_neighbours(tmp_path: Path) -> None:
    members = [(f"k{i}.png", PNG) for i in range(3)] + [(f"k{i}.txt", f"c{i}".encode()) for i in range(3)]
    rows = tar_rows(tmp_path / "a.tar", members)
    assert [(row.key, row.captions) for row in rows if isinstance(row, Picture)] == [
        (f"k{i}", (f"c{i}",)) for i in range(3)
    ]


def test_every_cut_of_a_tar_salvages_what_is_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", [member for i in range(4) for member in sample(f"k{i}", f"c{i}")])
    data = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [info.offset_data + info.size for info in tar.getmembers() if info.name.endswith(".json")]
    padded_end = -(-ends[-1] // 512) * 512
    for stop in range(1, len(data), 97):
        (tmp_path / "cut.tar").write_bytes(data[:stop])
        rows = rows_of(tmp_path / "cut.tar")
        whole = [row.key for row in rows if isinstance(row, Picture)]
        assert set(whole) >= {f"k{i}" for i, end in enumerate(ends) if end <= stop}
        assert max(Counter(row.key for row in rows if row.key).values(), default=0) <= 1
        lost = [row for row in rows if isinstance(row, Reject)]
        assert lost or stop >= padded_end + 512  # a cut is never silent
        if stop < 512:
            assert [row.reason for row in lost] == [Reason.SHARD_UNREADABLE]


def test_a_damaged_header_costs_its_own_sample_only(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [member for i in range(4) for member in sample(f"k{i}")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        offset = tar.getmember("k1.png").offset
    data[offset : offset + 64] = b"\xff" * 64
    (tmp_path / "a.tar").write_bytes(data)
    rows = rows_of(tmp_path / "a.tar")
    assert reasons(rows) == {
        "k0": "picture", "k1": "no_picture", "k2": "picture", "k3": "picture", "": "shard_damaged",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "detail"),
    [(b"", "empty"), (b"<html>404</html>" * 99, "no tar"), (b"\x1f\x8b" + b"x" * 2000, "compressed")],
)
def test_a_file_that_is_no_tar_is_one_reject(tmp_path: Path, data: bytes, detail: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row, Reject)
    assert (row.source, row.reason) == ("a.tar", Reason.SHARD_UNREADABLE)
    assert detail in row.detail


def test_a_vanished_tar_is_one_reject_and_a_failing_network_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard("a.tar", str(tmp_path / "a.tar"), "tar")
    assert [row.reason for row in read_shard(shard) if isinstance(row, Reject)] == [Reason.SHARD_UNREADABLE]

    def fail(address: str) -> None:
        raise TimeoutError("slow store")

    monkeypatch.setattr("raymuse.storage.sources.open_seekable", fail)
    with pytest.raises(TimeoutError):
        list(read_shard(shard))


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("k.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    (row,) = rows_of(tmp_path / "a.tar")
    assert isinstance(row, Reject)
    assert row.reason is Reason.NO_PICTURE
    assert "link" in row.detail


# --- folders


def test_a_folder_of_pictures_at_any_depth(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.png": PNG, "b.txt": b"from text",
            "a/猫.JPG": PNG, "a/猫.txt": "une chatte é".encode(),
            "a/deep/c.webp": PNG, "a/deep/c.json": b'{"caption": "from json", "aesthetic": 7}',
            "none.gif": PNG,
            "twin.jpg": PNG, "twin.png": PNG, "twin.txt": b"x",
            "latin.png": PNG, "latin.txt": b"\xe9",
            "phone.heic": b"x",
            ".hidden/x.png": PNG, "__MACOSX/x.png": PNG, "notes.md": b"x",
        },
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert reasons(rows) == {
        "a/deep/c": "picture", "a/猫": "picture", "b": "picture", "latin": "bad_caption_encoding",
        "none": "no_caption", "phone": "unsupported_format", "twin": "duplicate_key",
    }  # fmt: skip
    assert len(rows) == 8  # eight pictures, of which twin comes twice
    found = {row.key: row for row in rows if isinstance(row, Picture)}
    assert found["a/deep/c"].captions == ("from json",)
    assert found["a/deep/c"].metadata == {"aesthetic": 7}
    assert found["twin"].captions == ("x",)


def test_a_folder_without_captions_takes_the_file_names(tmp_path: Path) -> None:
    write(tmp_path, {"a_red_fox.png": PNG, "x/two__cats.tiff": PNG, "_.bmp": PNG})
    rows = rows_of(tmp_path)
    assert {row.key: row.captions for row in rows if isinstance(row, Picture)} == {
        "a_red_fox": ("a red fox",),
        "x/two__cats": ("two  cats",),
    }
    assert reasons(rows)["_"] == "no_caption"


def test_caption_tables(tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([("file_name", "text", "aesthetic"), ("a.png", 'one, "quoted"', "6.5"), ("a.png", "two", "6.5")])
    writer.writerows([("gone.png", "x", ""), ("é.png", "accent", "")])
    write(
        tmp_path,
        {
            "captions.csv": table.getvalue().encode() + b"bad.png,caf\xe9,1\n",
            "a.png": PNG, "bad.png": PNG, "unlisted.png": PNG,
            "e\u0301.png": PNG,  # decomposed on disk, composed in the table
            "sub/metadata.jsonl": b'{"file": "d.png", "caption": "in a sub-folder", "width": 9}\n\n',
            "sub/d.png": PNG,
        },
    )  # fmt: skip
    rows = rows_of(tmp_path)
    found = {row.key: row for row in rows if isinstance(row, Picture)}
    assert {key: row.captions for key, row in found.items()} == {
        "a": ('one, "quoted"', "two"), "e\u0301": ("accent",), "sub/d": ("in a sub-folder",),
    }  # fmt: skip
    assert found["a"].metadata == {"aesthetic": 6.5}
    assert found["sub/d"].metadata == {"width": 9}
    assert {key: why for key, why in reasons(rows).items() if key not in found} == {
        "bad": "bad_caption_encoding", "gone": "no_picture", "unlisted": "no_caption",
    }  # fmt: skip
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("captions.csv", b"name,words\na.png,x\n", "needs a column file_name"),
        ("captions.csv", b"file,words\na.png,x\n", "needs a column text"),
        ("captions.jsonl", b"{}{}\n", "line 1 cannot be parsed"),
        ("captions.jsonl", b"[]\n", "line 1 is no JSON object"),
    ],
)
def test_a_broken_table_says_what_to_do(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    write(tmp_path, {"a.png": PNG, name: data})
    with pytest.raises(UserError, match=message):
        list_shards(str(tmp_path))


def test_a_folder_is_cut_into_shards_that_add_up(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:03d}.png": PNG for i in range(25)})
    shards = list_shards(str(tmp_path), images_per_shard=10)
    assert [(shard.name, len(shard.members)) for shard in shards] == [
        ("pictures-000000", 10), ("pictures-000001", 10), ("pictures-000002", 5),
    ]  # fmt: skip
    assert shards == list_shards(str(tmp_path), images_per_shard=10)
    assert pickle.loads(pickle.dumps(shards)) == shards
    assert len(pickle.dumps(shards[0])) < 10 * 300
    assert [row.key for shard in shards for row in read_shard(shard)] == [f"{i:03d}" for i in range(25)]


def test_a_file_that_vanishes_is_one_reject(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": PNG, "b.png": PNG})
    shards = list_shards(str(tmp_path))
    (tmp_path / "a.png").unlink()
    assert reasons([row for shard in shards for row in read_shard(shard)]) == {"a": "unreadable", "b": "picture"}


# --- addresses


def test_patterns_and_folders_of_tars(tmp_path: Path) -> None:
    for name in ("x/00000.tar", "x/00001.tar", "y/00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [("k", picture(), "c", {})])
    write(tmp_path, {"x/00000_stats.json": b"{}", "x/00000.parquet": b""})

    def names(address: str) -> list[str]:
        return [shard.name for shard in list_shards(address)]

    assert names(str(tmp_path)) == ["x/00000.tar", "x/00001.tar", "y/00000.tar"]
    assert names(f"{tmp_path}/x/{{00000..00001}}.tar") == ["00000.tar", "00001.tar"]
    assert names(f"{tmp_path}/*/00000.tar") == ["x/00000.tar", "y/00000.tar"]
    assert names(f"{tmp_path}/x/00001.tar") == ["00001.tar"]
    assert names(f"file://{tmp_path}/x") == ["00000.tar", "00001.tar"]
    with pytest.raises(UserError, match=r"00002.tar \(and 1 more\)"):
        list_shards(f"{tmp_path}/x/{{00000..00003}}.tar")
    with pytest.raises(UserError, match="End the pattern"):
        list_shards(f"{tmp_path}/x/*")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("missing", {}, "no such file or folder. Check"),
        ("empty", {"empty/.keep": b""}, "is empty. It needs"),
        ("text", {"text/a.md": b"x"}, "none is a .tar or a picture"),
        ("foreign", {"foreign/a.heic": b"x"}, "heic is not read"),
        ("both", {"both/a.tar": b"", "both/a.png": PNG}, "holds tars and loose pictures"),
        ("a.zip", {"a.zip": b""}, "is one file and no .tar"),
    ],
)
def test_addresses_that_hold_nothing_say_what_to_do(
    tmp_path: Path, name: str, files: dict[str, bytes], message: str
) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        list_shards(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_names_with_pattern_letters_are_names(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]{x}*"
    write(folder, {"k[0]*.png": PNG, "::.png": PNG})
    assert set(reasons(rows_of(folder))) == {"k[0]*", "::"}


def test_remote_addresses() -> None:
    """fsspec's memory file system: a real one, but for the network."""
    write_shard("memory://bucket/tars/00000.tar", [(f"k{i}", picture(i), f"c{i}", {}) for i in range(3)])
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/loose/a.png": PNG, "/bucket/loose/a.txt": b"c", "/bucket/loose/d/b.png": PNG})
    assert reasons(rows_of("memory://bucket/tars")) == {f"k{i}": "picture" for i in range(3)}
    assert [shard.name for shard in list_shards("memory://bucket/tars/*.tar")] == ["00000.tar"]
    assert [shard.name for shard in list_shards("memory://bucket/tars/{00000..00000}.tar")] == ["00000.tar"]
    assert reasons(rows_of("memory://bucket/loose")) == {"a": "picture", "d/b": "no_caption"}
    index = PictureIndex(list_shards("memory://bucket/tars"))
    assert [index[i].data for i in range(3)] == [encode(picture(i)) for i in range(3)]
    with pytest.raises(UserError, match="credentials"):
        list_shards("memory://bucket/nothing")


# --- random access


def test_the_index_agrees_with_reading_in_order(tmp_path: Path) -> None:
    write_tar(tmp_path / "t/0.tar", [*sample("k0", width=3, url="x"), ("bad.png", PNG), *sample("k1", "c1")])
    write(tmp_path / "f", {"x.png": encode(picture(7)), "x.txt": b"in a folder"})
    shards = [*list_shards(str(tmp_path / "t")), *list_shards(str(tmp_path / "f"))]
    index = pickle.loads(pickle.dumps(PictureIndex(shards)))
    read = [row for shard in shards for row in read_shard(shard)]
    pictures = [row for row in read if isinstance(row, Picture)]
    assert len(index) == 3
    assert [(index[i].key, index[i].data, index[i].captions) for i in (2, 0, 1)] == [
        (pictures[i].key, pictures[i].data, pictures[i].captions) for i in (2, 0, 1)
    ]
    assert index.captions(2) == ("in a folder",)
    assert index[0].metadata == {"width": 3}
    assert index.rejects == [row for row in read if isinstance(row, Reject)]
    assert index.refused() == {"no_caption": 1}
    with pytest.raises(IndexError):
        index[3]
    (tmp_path / "t/0.tar").write_bytes(b"")
    with pytest.raises(OSError, match="changed since"):
        index[0]


def test_unreadable_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(Unreadable(Reason.TOO_LARGE, "why")))
    assert (error.reason, error.detail, str(error)) == (Reason.TOO_LARGE, "why", "too_large: why")


def test_reading_and_decoding_load_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, raymuse.storage.picture_index, raymuse.storage.webdataset_writer, raymuse.encoding.pictures\n"
        "print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
