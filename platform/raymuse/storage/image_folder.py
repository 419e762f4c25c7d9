"""A folder of captioned pictures: which files there are, where the caption of each stands, and its rows."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.captions import TABLES, TableRow, read_table
from raymuse.storage.entries import make_entry
from raymuse.storage.places import Place, ending_of
from raymuse.storage.rejects import Reason, Reject, Unreadable, printable
from raymuse.storage.rows import Entry, Member, Picture, Reading, Shard
from raymuse.storage.tar_scan import Span

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FOREIGN_ENDINGS = ("avif", "heic", "heif", "jp2", "jxl", "svg", "ico", "psd", "tga", "eps", "pdf", "cr2", "nef", "dng")


def list_shards(place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
    """The pictures by sorted names, cut into shards. Raises UserError where there is none."""
    members = folder_members(place.folder, place.files, reading)
    if all(member.refused for member in members):
        raise UserError(_nothing(place, members))
    return [
        Shard(f"pictures-{number:06d}", place.folder, "folder", tuple(members[start : start + images_per_shard]))
        for number, start in enumerate(range(0, len(members), images_per_shard))
    ]


def read_shard(shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
    for row in read_entries(shard, reading):
        yield _load(shard, row) if isinstance(row, Entry) else row


def read_entries(shard: Shard, reading: Reading) -> Iterator[Entry | Reject]:
    for member in shard.members:
        try:
            yield _entry(shard, member, reading)
        except Unreadable as error:
            yield Reject(shard.name, member.key, error.reason, error.detail)
        except OSError as error:
            if not sources.is_final(error, shard.address):
                raise
            yield Reject(shard.name, member.key, Reason.UNREADABLE, str(error))


def count_rows(shards: Sequence[Shard], reading: Reading) -> int:
    return sum(len(shard.members) for shard in shards)


def folder_members(folder: str, files: Sequence[str], reading: Reading) -> list[Member]:
    """The pictures among the files of a folder, sorted by name.

    The file name is the caption only where nothing in the folder tells a caption: where others have one, a picture
    without is NO_CAPTION, since names such as IMG_2031 would be trained on unseen. Of pictures with the same
    name but for the ending, the first is taken. A table row without its picture is NO_PICTURE.

    Raises:
        UserError: a caption table cannot be parsed.
    """
    present = set(files)
    rows = _table_rows(folder, files, reading)
    pictures = [name for name in files if ending_of(name) in PICTURE_ENDINGS]
    named = reading.caption_column is None and not rows and not _have_captions_beside(pictures, present)
    members = [_member(name, present, rows.pop(_plain(name), TableRow()), named) for name in pictures]
    foreign = [
        Member(name, refused=Reason.UNSUPPORTED_FORMAT, detail=f"{printable(name)}: .{ending_of(name)} is not read")
        for name in files
        if ending_of(name) in FOREIGN_ENDINGS
    ]
    for member in foreign:
        rows.pop(_plain(member.picture), None)
    missing = [
        Member(name, refused=Reason.NO_PICTURE, detail=f"the caption table names {printable(name)}, which is not there")
        for name in rows
    ]
    return _refuse_doubles(sorted([*members, *foreign, *missing], key=lambda member: (member.key, member.picture)))


def holds_pictures(files: Iterable[str]) -> bool:
    return any(ending_of(name) in PICTURE_ENDINGS for name in files)


def tells_captions(files: Sequence[str]) -> bool:
    """Whether files of the folder say captions: a table, or a .txt or .json beside a picture."""
    pictures = [name for name in files if ending_of(name) in PICTURE_ENDINGS]
    return any(_is_table(name) for name in files) or _have_captions_beside(pictures, set(files))


_BESIDE = ("txt", "json")  # endings of the files that belong to a picture


def _load(shard: Shard, entry: Entry) -> Picture | Reject:
    try:
        return entry.picture(sources.read_bytes(entry.address))
    except OSError as error:
        if not sources.is_final(error, entry.address):
            raise
        return Reject(shard.name, entry.key, Reason.UNREADABLE, str(error))


def _entry(shard: Shard, member: Member, reading: Reading) -> Entry:
    """Raises Unreadable where the member has no usable picture or caption, OSError where a file cannot be read."""
    if member.refused:
        raise Unreadable(member.refused, member.detail)
    address = sources.join(shard.address, member.picture)
    text, fields = (
        sources.read_bytes(sources.join(shard.address, name)) if name else None
        for name in (member.text, member.metadata)
    )
    span = Span(0, sources.size_of(address))
    return make_entry(member.key, text, fields, member.fields, member.captions, address, span, reading)


def _have_captions_beside(pictures: Sequence[str], present: set[str]) -> bool:
    return any(f"{_stem(name)}.{ending}" in present for name in pictures for ending in _BESIDE)


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


def _table_rows(folder: str, files: Sequence[str], reading: Reading) -> dict[str, TableRow]:
    """Rows of every caption table, by the picture's name relative to the folder."""
    rows: dict[str, TableRow] = {}
    for name in files:
        if _is_table(name):
            parent, slash, _ = name.rpartition("/")
            for picture, row in read_table(name, sources.read_bytes(sources.join(folder, name)), reading).items():
                rows[_plain(f"{parent}{slash}{picture.removeprefix('./')}")] = row
    return rows


def _is_table(name: str) -> bool:
    return name.rpartition("/")[2] in TABLES


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _nothing(place: Place, members: list[Member]) -> str:
    endings = ", ".join(f".{ending}" for ending in PICTURE_ENDINGS)
    if not place.files:
        return f"{place.address} is empty. It needs tars (WebDataset), Parquet files, or pictures ({endings})."
    why = f"; the first of {len(members)} refused: {members[0].detail}" if members else ""
    return f"{place.address} holds {len(place.files)} files, and none is a .tar or a picture ({endings}){why}."
