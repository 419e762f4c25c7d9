"""What stands at an address of the input: one file, the files of a pattern, or a folder with all that is in it."""

import re
from dataclasses import dataclass
from typing import Literal

import braceexpand

from raymuse.config.errors import UserError
from raymuse.storage import sources

_GLOB = re.compile(r"[*?\[]")
_PATTERN = re.compile(r"[{*?\[]")


@dataclass(frozen=True)
class Place:
    """Files to be read.

    Args:
        address: as it was given, for messages.
        kind: what it names.
        folder: what the file names are relative to; "" is where the program runs.
        files: names in the order in which they are read.
    """

    address: str
    kind: Literal["file", "pattern", "folder", "data set"]
    folder: str
    files: tuple[str, ...] = ()

    def within(self, name: str) -> str:
        """The address of one of the files."""
        return sources.join(self.folder, name)


def find_place(address: str) -> Place:
    """Look what is there. Raises UserError where nothing is, or where one file of a range is missing."""
    kind = sources.kind_of(address)
    if kind == "folder":
        return Place(address, "folder", address, tuple(sources.list_files(address)))
    if kind == "file":
        folder, _, name = address.rpartition("/")
        return Place(address, "file", folder or ("/" if address.startswith("/") else ""), (name,))
    if not _PATTERN.search(address):
        raise UserError(f"{address}: no such file or folder. Check the spelling and, for a store, the credentials.")
    found = _expand(address)
    folder = _common_folder(found)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    return Place(address, "pattern", folder, tuple(name.removeprefix(prefix) for name in found))


def ending_of(name: str) -> str:
    """The lower-case ending of a file name, without its dot."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()


def _expand(pattern: str) -> list[str]:
    """Addresses of a brace range or glob, each once, in its order. Raises UserError where one is missing."""
    names = list(braceexpand.braceexpand(pattern))
    there = sources.present(name for name in names if not _GLOB.search(name))
    found: dict[str, None] = {}
    missing = []
    for name in names:
        matches = sources.glob(name) if _GLOB.search(name) else [name] if name in there else []
        if not matches:
            missing.append(name)
        found |= dict.fromkeys(matches)
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{pattern}: nothing at {missing[0]}{others}. Name files that are there, or their folder.")
    return list(found)


def _common_folder(addresses: list[str]) -> str:
    """The deepest folder that holds all, so that the names in it do not depend on where the data lies."""
    common: list[str] | None = None
    for address in addresses:
        parts = address.split("/")[:-1]
        if common is None:
            common = parts
        while common != parts[: len(common)]:
            common = common[:-1]
    return "/".join(common or []) or ("/" if addresses[0].startswith("/") else "")
