"""The samples of a WebDataset tar: where each member lies, also in a tar that is cut or damaged.

Python's tarfile, not webdataset's iterator: that one raises at the first damage (what follows is lost), drops names
that it cannot split without a word, raises on a doubled name, and loses a sample whose members are not neighbours.
With `ignore_zeros` tarfile finds the next sound header after a damage; the gaps that it skips are reported here.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from raymuse.storage.rejects import Reason, printable

BLOCK = 512  # a tar is cut in blocks of this many bytes
END_MARK = 2 * BLOCK  # zeros that end a tar; one block is also taken
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file."""

    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """Members of one key, by lower-case ending; `links` are members without bytes of their own."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    repeated: bool = False  # its key came before, and is complete without it
    cut: bool = False  # the tar ends inside one of its members


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of the tar that is lost, with whatever keys were in it."""

    reason: Reason
    detail: str


@dataclass
class TarScan:
    """Samples in the order of their first member, and what could not be read."""

    samples: list[TarSample] = field(default_factory=list)
    damages: list[Damage] = field(default_factory=list)


def scan_tar(stream: IO[bytes]) -> TarScan:
    """Find every sample of an open tar in one pass over its headers. Raises OSError only."""
    scan = TarScan()
    size = stream.seek(0, 2)
    newest: dict[str, TarSample] = {}
    for info in _members(stream, size, scan.damages):
        name = split_name(info.name)
        if name is None or info.isdir():
            continue
        key, ending = name
        sample = newest.get(key)
        if sample is None or ending in sample.members:
            newest[key] = sample = TarSample(key, repeated=sample is not None)
            scan.samples.append(sample)
        if not info.isreg() or info.sparse is not None:
            sample.links.append(ending)
            continue
        sample.members[ending] = Span(info.offset_data, info.size)
        sample.cut |= info.offset_data + info.size > size
    return scan


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case ending of a member, split at the first dot of its base name as WebDataset does.

    None for hidden files (`._x.jpg` of macOS) and WebDataset's own members. A key is a label: never open it as a path.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    if not stem or _META.match(name):
        return None
    return printable(f"{folder}{slash}{stem}"), printable(ending.lower())


def _members(stream: IO[bytes], size: int, damages: list[Damage]) -> Iterator[tarfile.TarInfo]:
    """Members in their order; `damages` grows by what lies between them and is neither member nor zeros."""
    end = count = 0  # where the last member ends; members so far
    for info in _headers(stream):
        if info.offset > end and not _zeros(stream, end, info.offset):
            damages.append(Damage(Reason.SHARD_DAMAGED, f"bytes {end} to {info.offset} hold no member"))
        count += 1
        end = info.offset_data + (-(-info.size // BLOCK) * BLOCK if info.isreg() else 0)
        yield info
        if info.isreg() and info.offset_data + info.size > size:
            return  # cut inside a member: its sample says so
    if count == 0 and not (size >= BLOCK and _zeros(stream, 0, size)):
        damages.append(Damage(Reason.SHARD_UNREADABLE, _no_tar(stream, size)))
    elif not _zeros(stream, end, size):
        damages.append(Damage(Reason.TRUNCATED, f"nothing can be read after byte {end} of {size}"))
    elif size - end < BLOCK:
        damages.append(Damage(Reason.TRUNCATED, f"the tar ends after {count} members without the mark of its end"))


def _headers(stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", ignore_zeros=True) as tar:
            place = -1
            while (info := tar.next()) is not None and info.offset > place and info.size >= 0:
                place = info.offset
                yield info
    except (tarfile.TarError, ValueError, OverflowError):
        return  # what is left shows as a tail that is not zeros


def _zeros(stream: IO[bytes], start: int, stop: int) -> bool:
    stream.seek(start)
    while start < stop:
        piece = stream.read(min(1 << 20, stop - start))
        if piece.count(0) != len(piece) or not piece:
            return False
        start += len(piece)
    return True


def _no_tar(stream: IO[bytes], size: int) -> str:
    stream.seek(0)
    first = stream.read(16)
    if first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "the tar is compressed; unpack it: pictures gain nothing from it"
    return "the file is empty" if size == 0 else f"this is no tar: it begins with {first!r}"
