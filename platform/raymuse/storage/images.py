"""Captioned pictures in: WebDataset tars (img2dataset's layout) or a folder of pictures, as shards of rows.

for shard in list_shards("data/{00000..00009}.tar"):
    for row in read_shard(shard):        # Picture | Reject, every key of the input exactly once
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import braceexpand

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.captions import choose_captions, parse_metadata
from raymuse.storage.image_folder import FOREIGN_ENDINGS, PICTURE_ENDINGS, Member, folder_members
from raymuse.storage.rejects import Reason, Reject, Unreadable
from raymuse.storage.tar_scan import Span, TarSample, scan_tar

MAX_PICTURE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20


@dataclass(frozen=True)
class Shard:
    """A unit of work: a tar, or a run of pictures of a folder. Small and picklable.

    Args:
        name: unique in its list; stands as `source` in rejects. The same wherever the data lies.
        address: the tar, or the folder.
        kind: which of the two.
        members: the pictures of this shard, where it is cut from a folder.
    """

    name: str
    address: str
    kind: Literal["tar", "folder"]
    members: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A captioned picture, not decoded.

    Args:
        key: unique in its shard; a label, never a path.
        data: the bytes of the file.
        captions: at least one; none is empty.
        metadata: what the .json or the table says besides (width, height, original_width, aesthetic, ...).
    """

    key: str
    data: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture whose bytes are not read yet: they are the span of the file at `address`."""

    key: str
    captions: tuple[str, ...]
    metadata: dict[str, Any]
    address: str
    span: Span


def list_shards(address: str, *, images_per_shard: int = 1000) -> list[Shard]:
    """The shards at an address, always in the same order.

    Args:
        address: a folder of tars, one .tar, a brace range or glob of them (`{00000..00009}.tar`, `*.tar`), or
            a folder of pictures (at any depth); local or any fsspec address.
        images_per_shard: pictures a shard, where a folder of pictures is cut by sorted names.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    kind = sources.kind_of(address)
    if kind is None and re.search(r"[{*?\[]", address):
        return _tar_shards(_expand(address))
    if kind is None:
        raise UserError(f"{address}: no such file or folder. Check the spelling and, for a store, the credentials.")
    if kind == "file":
        if not address.endswith(".tar"):
            raise UserError(f"{address} is one file and no .tar. Name the folder that it is in, or a .tar.")
        return _tar_shards([address])
    return _folder_shards(address, images_per_shard)


def _folder_shards(address: str, images_per_shard: int) -> list[Shard]:
    files = sources.list_files(address)
    tars = [name for name in files if name.endswith(".tar")]
    if tars and any(name.rpartition(".")[2].lower() in PICTURE_ENDINGS for name in files):
        raise UserError(f"{address} holds tars and loose pictures. Name one kind: {sources.join(address, '*.tar')}.")
    if tars:
        return [Shard(name, sources.join(address, name), "tar") for name in tars]
    members = folder_members(address, files)
    if all(member.refused for member in members):
        raise UserError(_nothing(address, files, members))
    return [
        Shard(f"pictures-{number:06d}", address, "folder", tuple(members[start : start + images_per_shard]))
        for number, start in enumerate(range(0, len(members), images_per_shard))
    ]


def read_shard(shard: Shard) -> Iterator[Picture | Reject]:
    """Every key of the shard exactly once, as a Picture or as a Reject; a lost stretch of a tar is one Reject.

    Holds one picture in memory at a time. A tar that is missing, forbidden or no tar at all is one Reject; any
    other OSError (a network that fails) is raised, for the caller to try again.
    """
    for row, stream in _rows(shard):
        yield _load(shard, row, stream) if isinstance(row, Entry) else row


def read_entries(shard: Shard) -> Iterator[Entry | Reject]:
    """As `read_shard`, but without the bytes of the pictures."""
    return (row for row, _ in _rows(shard))


def _rows(shard: Shard) -> Iterator[tuple[Entry | Reject, IO[bytes] | None]]:
    """Every row of the shard and, for a tar, the open tar that holds its bytes."""
    if shard.kind == "folder":
        for member in shard.members:
            yield _guarded(_member_entry, shard, member), None
        return
    try:
        stream = sources.open_seekable(shard.address)
    except _GONE as error:
        yield Reject(shard.name, "", Reason.SHARD_UNREADABLE, str(error)), None
        return
    with stream:
        scan = scan_tar(stream)
        for sample in scan.samples:
            yield _guarded(_sample_entry, shard, sample, stream), stream
        for damage in scan.damages:
            yield Reject(shard.name, "", damage.reason, damage.detail), stream


_GONE = (FileNotFoundError, PermissionError)  # trying again does not help


def _guarded(entry_of: Callable[..., Entry], shard: Shard, row: Member | TarSample, *more: object) -> Entry | Reject:
    try:
        return entry_of(shard, row, *more)
    except Unreadable as error:
        return Reject(shard.name, row.key, error.reason, error.detail)
    except _GONE as error:
        return Reject(shard.name, row.key, Reason.UNREADABLE, str(error))


def _load(shard: Shard, entry: Entry, stream: IO[bytes] | None) -> Picture | Reject:
    try:
        data = sources.read_bytes(entry.address) if stream is None else _span(stream, entry.span)
    except _GONE as error:
        return Reject(shard.name, entry.key, Reason.UNREADABLE, str(error))
    return Picture(entry.key, data, entry.captions, entry.metadata)


def _sample_entry(shard: Shard, sample: TarSample, stream: IO[bytes]) -> Entry:
    """Raises Unreadable where the sample has no usable picture or caption."""
    if sample.repeated:
        raise Unreadable(Reason.DUPLICATE_KEY, "its key came before in this shard; the first is kept")
    if sample.cut:
        raise Unreadable(Reason.TRUNCATED, "the tar ends inside this sample; what came after it is lost")
    ending = next((ending for ending in PICTURE_ENDINGS if ending in sample.members), None)
    if ending is None:
        raise _no_picture(sample)
    picture = sample.members[ending]
    text, fields = (_text(stream, sample.members.get(name)) for name in ("txt", "json"))
    return _entry(sample.key, text, fields, {}, (), shard.address, picture)


def _member_entry(shard: Shard, member: Member) -> Entry:
    """Raises Unreadable where the member has no usable picture or caption, OSError where a file cannot be read."""
    if member.refused:
        raise Unreadable(member.refused, member.detail)
    address = sources.join(shard.address, member.picture)
    text, fields = (
        sources.read_bytes(sources.join(shard.address, name)) if name else None
        for name in (member.text, member.metadata)
    )
    span = Span(0, sources.size_of(address))
    return _entry(member.key, text, fields, member.fields, member.captions, address, span)


def _entry(
    key: str,
    text: bytes | None,
    fields: bytes | None,
    more: Mapping[str, Any],
    spare: tuple[str, ...],
    address: str,
    span: Span,
) -> Entry:
    if span.size > MAX_PICTURE_BYTES:
        raise Unreadable(Reason.TOO_LARGE, f"the file has {span.size} bytes; at most {MAX_PICTURE_BYTES} are read")
    metadata = {**more, **(parse_metadata(fields) if fields is not None else {})}
    captions = choose_captions(text, metadata, spare)
    kept = {name: value for name, value in metadata.items() if name not in ("caption", "captions")}
    return Entry(key, captions, kept, address, span)


def _no_picture(sample: TarSample) -> Unreadable:
    endings = [*sample.members, *sample.links]
    foreign = [ending for ending in endings if ending in FOREIGN_ENDINGS]
    if foreign:
        return Unreadable(Reason.UNSUPPORTED_FORMAT, f".{foreign[0]} is not read")
    there = ", ".join(f".{ending}" if ending else "a file without an ending" for ending in endings)
    hint = "; a link holds no bytes" if sample.links else "; a key ends at the first dot of the file name"
    return Unreadable(Reason.NO_PICTURE, f"the key has only {there}{hint}")


def _text(stream: IO[bytes], span: Span | None) -> bytes | None:
    if span is None:
        return None
    if span.size > MAX_TEXT_BYTES:
        raise Unreadable(
            Reason.TOO_LARGE, f"a caption or .json has {span.size} bytes; at most {MAX_TEXT_BYTES} are read"
        )
    return _span(stream, span)


def _span(stream: IO[bytes], span: Span) -> bytes:
    stream.seek(span.offset)
    return stream.read(span.size)


def _expand(pattern: str) -> list[str]:
    """Addresses of a brace range or glob, each once, in its order. Raises UserError where one is missing."""
    found: dict[str, None] = {}
    missing = []
    for name in braceexpand.braceexpand(pattern):
        matches = sources.glob(name) if re.search(r"[*?\[]", name) else [name] if sources.kind_of(name) else []
        if not matches:
            missing.append(name)
        found |= dict.fromkeys(matches)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{pattern}: nothing at {missing[0]}{others}. Name tars that are there, or their folder.")
    if loose := [name for name in found if not name.endswith(".tar")]:
        raise UserError(f"{pattern} also matches {loose[0]}. End the pattern with .tar, or name a folder of pictures.")
    return list(found)


def _tar_shards(addresses: list[str]) -> list[Shard]:
    """Tars named from their common folder on, so that a name does not depend on where the data lies."""
    parents = [address.rpartition("/")[0] for address in addresses]
    common = parents[0] if len(set(parents)) == 1 else os.path.commonpath(parents)
    prefix = f"{common}/" if common else ""
    return [Shard(address.removeprefix(prefix), address, "tar") for address in addresses]


def _nothing(address: str, files: list[str], members: list[Member]) -> str:
    endings = ", ".join(f".{ending}" for ending in PICTURE_ENDINGS)
    if not files:
        return f"{address} is empty. It needs tars (WebDataset), or pictures ({endings})."
    why = f"; the first of {len(members)} refused: {members[0].detail}" if members else ""
    return f"{address} holds {len(files)} files, and none is a .tar or a picture ({endings}){why}."
