"""Captions as they are trained on: found where they are said to be, mended where that is asked for, and counted."""

import json
from pathlib import Path

import pytest

from raymuse.config.errors import UserError
from raymuse.storage.captions import CLEANED, REPAIRED, clean_captions
from raymuse.storage.images import Picture, Reading, list_shards, read_shard
from raymuse.storage.rejects import Reason, Reject, Unreadable
from raymuse.storage.webdataset_writer import write_tar

REPAIR = Reading(repair_captions=True)


@pytest.mark.parametrize(
    ("raw", "text", "notes"),
    [
        (b"plain", "plain", ()),
        ("naïve 猫".encode(), "naïve 猫", ()),
        (b"caf\xe9", "café", (REPAIRED,)),
        (b"caf\xe9 \xe7\x8c\xab", "café 猫", (REPAIRED,)),  # only the odd byte is read as Latin-1
        (b"\x93quoted\x94 \x80 5", "“quoted” € 5", (REPAIRED,)),  # Windows' Latin-1, not the standard's
        (b"a\x81b", "ab", (CLEANED, REPAIRED)),  # a byte that even Windows left without a letter
        ("\ufeffUTF-16 naïve".encode("utf-16-le"), "UTF-16 naïve", (REPAIRED,)),
        (b"\xef\xbb\xbfbyte order mark\r\n", "byte order mark", ()),
        ("half \ud83d of a letter", "half  of a letter", (REPAIRED,)),
        ("odd \udce9 byte", "odd é byte", (REPAIRED,)),
        (b"nu\0l\x1b[31m", "nul[31m", (CLEANED,)),
        ("right\u202eto\u2066left", "righttoleft", (CLEANED,)),
        ("two\nlines\tand a tab", "two\nlines\tand a tab", ()),
    ],
)
def test_a_caption_is_repaired_and_cleaned_with_a_note(raw: str | bytes, text: str, notes: tuple[str, ...]) -> None:
    captions = clean_captions([raw], REPAIR)
    assert captions.texts == (text,)
    assert captions.notes == notes


@pytest.mark.parametrize("raw", [b"caf\xe9", "odd \udce9 byte", "\ud800"])
def test_unless_told_to_repair_what_is_not_utf8_is_refused(raw: str | bytes) -> None:
    with pytest.raises(Unreadable) as raised:
        clean_captions(["good", raw], Reading())
    assert raised.value.reason is Reason.BAD_CAPTION_ENCODING


def test_doubles_and_empty_captions_go_and_the_prefix_comes_before_each() -> None:
    captions = clean_captions(["a", " ", "b\0", " a ", "b"], Reading(caption_prefix="a photo of "))
    assert captions.texts == ("a photo of a", "a photo of b")
    assert captions.notes == (CLEANED,)
    with pytest.raises(Unreadable, match="no_caption"):
        clean_captions(["\0\u202e "], Reading(caption_prefix="a photo of "))


def test_a_megabyte_of_caption_is_a_caption() -> None:
    text = "a long story " * 80_000
    assert clean_captions([text.encode()], Reading()).texts == (text.strip(),)


def tar_row(path: Path, reading: Reading, **members: bytes) -> Picture | Reject:
    write_tar(path, [("k.png", b"x"), *((f"k.{name}", data) for name, data in members.items())])
    (row,) = read_shard(list_shards(str(path), reading=reading)[0], reading)
    return row


def test_a_field_that_is_named_wins_over_the_text_file(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "raw", "blip": ["made up", "also made up"], "width": 3}).encode()
    row = tar_row(tmp_path / "a.tar", Reading(caption_column="blip"), txt=b"from text", json=fields)
    assert isinstance(row, Picture)
    assert row.captions == ("made up", "also made up")
    assert row.metadata == {"width": 3}
    for missing in (b'{"caption": "raw"}', b'{"blip": " "}'):
        row = tar_row(tmp_path / "a.tar", Reading(caption_column="blip"), txt=b"from text", json=missing)
        assert isinstance(row, Reject)
        assert row.reason is Reason.NO_CAPTION
        assert "'blip'" in row.detail


def test_a_repaired_picture_carries_the_note(tmp_path: Path) -> None:
    assert isinstance(tar_row(tmp_path / "a.tar", Reading(), txt=b"caf\xe9"), Reject)
    row = tar_row(tmp_path / "a.tar", REPAIR, txt=b"caf\xe9")
    assert isinstance(row, Picture)
    assert (row.captions, row.notes) == (("café",), (REPAIRED,))
    odd = b'{"caption": "caf\xe9", "width": 3}'
    refused = tar_row(tmp_path / "a.tar", Reading(), json=odd)
    assert isinstance(refused, Reject)
    assert refused.reason is Reason.BAD_METADATA
    row = tar_row(tmp_path / "a.tar", REPAIR, json=odd)
    assert isinstance(row, Picture)
    assert (row.captions, row.notes, row.metadata) == (("café",), (REPAIRED,), {"width": 3})


def folder_rows(folder: Path, reading: Reading) -> dict[str, Picture | Reject]:
    return {row.key: row for shard in list_shards(str(folder), reading=reading) for row in read_shard(shard, reading)}


def test_a_table_column_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.png").write_bytes(b"x")
    (tmp_path / "b.txt").write_bytes(b"from text")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text,blip,score\na.png,one,two,3\nb.png,one,caf\xe9,4\n")
    rows = folder_rows(tmp_path, Reading(caption_column="blip", caption_prefix="> ", repair_captions=True))
    pictures = {key: row for key, row in rows.items() if isinstance(row, Picture)}
    assert {key: row.captions for key, row in pictures.items()} == {"a": ("> two",), "b": ("> café",)}
    assert pictures["b"].notes == (REPAIRED,)
    assert pictures["a"].metadata == {"score": 3}
    with pytest.raises(UserError, match=r"metadata\.csv needs a column blp; it has file_name, text, blip, score"):
        list_shards(str(tmp_path), reading=Reading(caption_column="blp"))


def test_a_line_of_a_table_without_a_caption_costs_only_its_picture(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n{"file_name": "b.png", "text": "x"}\n')
    rows = folder_rows(tmp_path, Reading())
    assert isinstance(rows["b"], Picture)
    assert isinstance(rows["a"], Reject)
    assert rows["a"].reason is Reason.NO_CAPTION


def test_where_a_field_is_named_file_names_are_no_captions(tmp_path: Path) -> None:
    (tmp_path / "a_red_fox.png").write_bytes(b"x")
    (row,) = folder_rows(tmp_path, Reading(caption_column="blip")).values()
    assert isinstance(row, Reject)
    assert row.reason is Reason.NO_CAPTION
