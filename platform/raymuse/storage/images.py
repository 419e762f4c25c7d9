"""Captioned pictures in, of any kind of input, as shards of rows.

for shard in list_shards("data/{00000..00009}.tar"):
    for row in read_shard(shard):        # Picture | Reject, every key of the input exactly once

Each kind of input is one module with the functions of `Format`, and stands in FORMATS; `_kind_of` tells them apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from raymuse.config.errors import UserError
from raymuse.storage import arrow_rows, hub, image_folder, parquet_rows, tar_rows
from raymuse.storage.places import Place, ending_of, find_place
from raymuse.storage.rejects import Reject
from raymuse.storage.rows import AS_IS, Entry, Kind, Picture, Reading, Shard

__all__ = ["Entry", "Picture", "Reading", "Shard", "estimate_rows", "list_shards", "read_entries", "read_shard"]


class Format(Protocol):
    """What the module of one kind of input offers."""

    def list_shards(self, place: Place, images_per_shard: int, reading: Reading) -> list[Shard]:
        """The shards at a place, at least one, always in the same order. Raises UserError."""

    def read_shard(self, shard: Shard, reading: Reading) -> Iterator[Picture | Reject]:
        """As `read_shard` below."""

    def count_rows(self, shards: Sequence[Shard], reading: Reading) -> int | None:
        """How many rows some shards of this kind hold, or about how many; None where only reading would tell."""


FORMATS: dict[Kind, Format] = {
    "tar": tar_rows,
    "folder": image_folder,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "hub": hub,
}


def list_shards(address: str | Sequence[str], *, images_per_shard: int = 1000, reading: Reading = AS_IS) -> list[Shard]:
    """The shards at an address, or at several, always in the same order.

    Args:
        address: a folder of tars or of Parquet files, one of them, a brace range or glob of them
            (`{00000..00009}.tar`, `*.parquet`), a folder of pictures (at any depth), a folder that `datasets` saved;
            local or any fsspec address; or `hf://datasets/OWNER/NAME`. Of several, names of shards begin with the
            number of theirs (`0/00000.tar`).
        images_per_shard: pictures a shard, where a folder or table is cut; a block of a table is never cut.

    Raises:
        UserError: nothing is there, or nothing that can or may be read.
    """
    several = [address] if isinstance(address, str) else list(address)
    lists = [_shards_at(one, images_per_shard, reading) for one in several]
    if len(lists) == 1:
        return lists[0]
    return [replace(shard, name=f"{number}/{shard.name}") for number, shards in enumerate(lists) for shard in shards]


def read_shard(shard: Shard, reading: Reading = AS_IS) -> Iterator[Picture | Reject]:
    """Every key of the shard exactly once, as a Picture or as a Reject; a lost stretch of a file is one Reject.

    Holds one picture in memory at a time, or a few rows of a table. A file that is missing, damaged or (on a disk)
    forbidden is one Reject; any other OSError (a network that fails, a store that refuses) is raised, to try again.
    """
    return FORMATS[shard.kind].read_shard(shard, reading)


def read_entries(shard: Shard, reading: Reading = AS_IS) -> Iterator[Entry | Reject]:
    """As `read_shard`, but without the bytes of the pictures.

    Raises:
        UserError: the pictures of this kind of input are no spans of a file.
    """
    if shard.kind == "tar":
        return tar_rows.read_entries(shard, reading)
    if shard.kind == "folder":
        return image_folder.read_entries(shard, reading)
    raise UserError(
        f"{shard.address}: single pictures cannot be read out of this kind of input ({shard.kind}). Turn it into tars "
        "first: `raymuse data source=...`, and give the folder that it writes."
    )


def estimate_rows(shards: Sequence[Shard], reading: Reading = AS_IS) -> int | None:
    """How many rows the shards hold: exact, but for tars, whose first is counted; None where it is not known."""
    counts = [
        format_.count_rows([shard for shard in shards if shard.kind == kind], reading)
        for kind, format_ in FORMATS.items()
        if any(shard.kind == kind for shard in shards)
    ]
    return None if None in counts else sum(count for count in counts if count is not None)


def _shards_at(address: str, images_per_shard: int, reading: Reading) -> list[Shard]:
    try:
        place = Place(address, "data set", "") if hub.is_data_set(address) else find_place(address)
        return FORMATS[_kind_of(place)].list_shards(place, images_per_shard, reading)
    except PermissionError as error:
        raise UserError(
            f"{address} may not be read: {error}. Check who may read it and, for a store, the credentials."
        ) from error


def _kind_of(place: Place) -> Kind:
    """Which kind of input a place holds. Raises UserError where it is none, or more than one."""
    if place.kind == "data set":
        return "hub"
    if place.kind == "folder":
        return _kind_of_folder(place)
    kinds: dict[str, Kind] = {"tar": "tar", "parquet": "parquet"}
    found = [kinds.get(ending_of(name)) for name in place.files]
    first = found[0]
    if place.kind == "file" and first is None:
        raise UserError(f"{place.address} is one file and no .tar or .parquet. Name the folder that it is in.")
    for name, kind in zip(place.files, found, strict=True):
        if kind is None or kind != first:
            raise UserError(
                f"{place.address} also matches {name}. End the pattern with .tar or .parquet, or name a folder of "
                "pictures."
            )
    assert first is not None
    return first


def _kind_of_folder(place: Place) -> Kind:
    if arrow_rows.is_saved(place):
        return "arrow"
    tars, tables = (any(ending_of(name) == ending for name in place.files) for ending in ("tar", "parquet"))
    loose = image_folder.holds_pictures(place.files)
    if tars and loose:
        raise UserError(f"{place.address} holds tars and loose pictures. Name one kind: {place.within('*.tar')}.")
    if tars:
        return "tar"
    if tables and loose and not image_folder.tells_captions(place.files):
        raise UserError(
            f"{place.address} holds Parquet files and loose pictures. Name one kind: {place.within('*.parquet')}; or "
            "put captions beside the pictures."
        )
    return "parquet" if tables and not loose else "folder"
