"""A folder of captioned pictures: which files there are, and where the caption of each stands."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raymuse.storage.captions import TABLES, TableRow, read_table
from raymuse.storage.rejects import Reason, printable
from raymuse.storage.sources import join, read_bytes

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FOREIGN_ENDINGS = ("avif", "heic", "heif", "jp2", "jxl", "svg", "ico", "psd", "tga", "eps", "pdf", "cr2", "nef", "dng")


@dataclass(frozen=True, slots=True)
class Member:
    """One picture of a folder; its names are relative to the folder.

    Args:
        picture: its file; its key is that name without the ending.
        text: its .txt, where there is one.
        metadata: its .json, where there is one.
        captions: what a table, or else the file name, says.
        fields: the other columns of the table.
        refused: why it cannot be used, where the listing shows that already; `detail` says more.
    """

    picture: str
    text: str | None = None
    metadata: str | None = None
    captions: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: Reason | None = None
    detail: str = ""

    @property
    def key(self) -> str:
        return printable(_stem(self.picture))


def folder_members(folder: str, files: list[str]) -> list[Member]:
    """The pictures among the files of a folder, sorted by name.

    The file name is the caption only where nothing in the folder tells a caption: where others have one, a picture
    without is NO_CAPTION, since names such as IMG_2031 would be trained on unseen. Of pictures with the same
    name but for the ending, the first is taken. A table row without its picture is NO_PICTURE.

    Raises:
        UserError: a caption table cannot be parsed.
    """
    present = set(files)
    rows = _table_rows(folder, files)
    pictures = [name for name in files if _ending(name) in PICTURE_ENDINGS]
    named = not rows and not any(f"{_stem(name)}.{ending}" in present for name in pictures for ending in _BESIDE)
    members = [_member(name, present, rows.pop(_plain(name), TableRow()), named) for name in pictures]
    foreign = [
        Member(name, refused=Reason.UNSUPPORTED_FORMAT, detail=f"{printable(name)}: .{_ending(name)} is not read")
        for name in files
        if _ending(name) in FOREIGN_ENDINGS
    ]
    for member in foreign:
        rows.pop(_plain(member.picture), None)
    missing = [
        Member(name, refused=Reason.NO_PICTURE, detail=f"the caption table names {printable(name)}, which is not there")
        for name in rows
    ]
    return _refuse_doubles(sorted([*members, *foreign, *missing], key=lambda member: (member.key, member.picture)))


_BESIDE = ("txt", "json")  # endings of the files that belong to a picture


def _member(name: str, present: set[str], row: TableRow, named: bool) -> Member:
    stem = _stem(name)
    text, metadata = (beside if (beside := f"{stem}.{ending}") in present else None for ending in _BESIDE)
    said = stem.rpartition("/")[2].replace("_", " ").strip()
    captions = (said,) if named and said else tuple(row.captions)
    return Member(name, text, metadata, captions, row.metadata)


def _refuse_doubles(members: list[Member]) -> list[Member]:
    kept: list[Member] = []
    taken: dict[str, str] = {}  # key -> its picture
    for member in members:
        first = None if member.refused else taken.setdefault(member.key, member.picture)
        if first is not None and first != member.picture:
            detail = f"{printable(first)} has the same name but for its ending"
            member = Member(member.picture, refused=Reason.DUPLICATE_KEY, detail=detail)
        kept.append(member)
    return kept


def _table_rows(folder: str, files: list[str]) -> dict[str, TableRow]:
    """Rows of every caption table, by the picture's name relative to the folder."""
    rows: dict[str, TableRow] = {}
    for name in files:
        parent, slash, base = name.rpartition("/")
        if base in TABLES:
            for picture, row in read_table(name, read_bytes(join(folder, name))).items():
                rows[_plain(f"{parent}{slash}{picture.removeprefix('./')}")] = row
    return rows


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _ending(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower()
