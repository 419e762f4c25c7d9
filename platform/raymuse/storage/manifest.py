"""Exactly-once parts: what is done stands in a manifest, and running the same command again does the rest.

_manifest/config.json        what the parts were made with; another config on the same folder is refused
_manifest/part-000000.json   written only after the part's files are in place
_manifest/index-000000.json  the first 1000 of these joined, so that a resume reads few objects
_manifest/lock.json          who writes, and until when; it warns and never blocks
_manifest/run.json           the MLflow run that made the folder, where it was tracked
_SUCCESS                     last, with the counts
"""

import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raymuse.config.errors import UserError
from raymuse.storage.folder import Folder

COMPACT_EVERY = 1000
LOCK_SECONDS = 120.0
_INDEX = re.compile(r"index-(\d+)\.json")
_FIRST_INDEX = "index.json"  # of folders that were written when there was one index, of all records
_NO_RECORDS = ("config.json", "lock.json", "run.json")


@dataclass(frozen=True)
class FileRecord:
    """A file of a part: its name in the folder, its size in bytes, its sha256 (hex), and its rows where it has any."""

    name: str
    size: int
    sha256: str
    rows: int = 0

    @classmethod
    def of(cls, name: str, data: bytes) -> "FileRecord":
        return cls(name, len(data), hashlib.sha256(data).hexdigest())

    @classmethod
    def of_file(cls, name: str, path: Path, rows: int) -> "FileRecord":
        """The record of a local file that will become `name`."""
        with path.open("rb") as stream:
            return cls(name, path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest(), rows)


@dataclass(frozen=True)
class PartRecord:
    """One committed part: its files, how many rows it holds and refused, and where they came from."""

    name: str
    rows: int
    rejects: int
    source: str
    files: list[FileRecord]
    counts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "PartRecord":
        return cls(**{**record, "files": [FileRecord(**file) for file in record["files"]]})


class Manifest:
    """The manifest of one output folder, opened by the one process that commits to it."""

    def __init__(self, folder: Folder, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.done: dict[str, PartRecord] = {}
        self._single: dict[str, None] = {}  # names of the parts whose records stand alone, oldest first
        self._locked: float | None = None  # when the lock was last written, by the monotonic clock

    @classmethod
    def open(cls, address: str, identity: Mapping[str, Any]) -> "Manifest":
        """Open or start the folder. Raises UserError where it was made with another config, naming the fields."""
        folder = Folder(address)
        folder.create()
        manifest = cls(folder, json.loads(json.dumps(identity, sort_keys=True)))
        manifest._claim_config()
        manifest._lock()
        manifest.done = read_records(folder)
        names = [file.removesuffix(".json") for file in _record_files(folder)]
        manifest._single = dict.fromkeys(name for name in names if name in manifest.done)
        return manifest

    @property
    def finished(self) -> bool:
        return self.folder.exists("_SUCCESS")

    def pending(self, plan: Iterable[str]) -> list[str]:
        """The names of the plan that are not committed yet, in order."""
        return [name for name in plan if name not in self.done]

    def write_part(
        self, name: str, files: Mapping[str, bytes], *, rows: int, rejects: int, source: str, **counts: float
    ) -> PartRecord:
        """Put the files in place, then record the part. Doing it twice writes the same bytes twice."""
        for file, data in files.items():
            self.folder.write(file, data)
        records = [FileRecord.of(file, data) for file, data in files.items()]
        return self.record(PartRecord(name, rows, rejects, source, records, counts))

    def record(self, part: PartRecord) -> PartRecord:
        """Record a part whose files are already in place."""
        self.folder.write(f"_manifest/{part.name}.json", _json(asdict(part)))
        self.done[part.name] = part
        self._single[part.name] = None
        if len(self._single) >= COMPACT_EVERY:
            self._compact()
        if self._locked is None or time.monotonic() - self._locked > LOCK_SECONDS / 3:
            self._lock()
        return part

    def finish(self, **summary: Any) -> None:
        """Write `_SUCCESS` with the totals, sweep out what killed writers left half done, and let go of the folder."""
        parts = self.done.values()
        totals = {"parts": len(parts), "rows": sum(p.rows for p in parts), "rejects": sum(p.rejects for p in parts)}
        self.folder.remove_partials()
        self.folder.write("_SUCCESS", _json({**totals, **summary}))
        self.release()

    def release(self) -> None:
        """Let go of the folder; nothing happens where that is done already."""
        if self._locked is not None:
            self.folder.remove("_manifest/lock.json")
            self._locked = None

    def _claim_config(self) -> None:
        if not self.folder.exists("_manifest/config.json"):
            self.folder.write("_manifest/config.json", _json(self.identity))
            return
        changed = differing(json.loads(self.folder.read("_manifest/config.json")), self.identity)
        if changed:
            raise UserError(
                f"{self.folder.address} was made with another config: {'; '.join(changed)}. "
                "Use the old values, or another output folder."
            )

    def _compact(self) -> None:
        """Join the single records into the next index. Stopped half-way, some stand twice, which reads as once."""
        numbers = [int(found[1]) for file in self.folder.names("_manifest") if (found := _INDEX.fullmatch(file))]
        records = [asdict(self.done[name]) for name in self._single]
        self.folder.write(f"_manifest/index-{max(numbers, default=-1) + 1:06d}.json", _json(records))
        self.folder.remove_files([f"_manifest/{name}.json" for name in self._single])
        self._single.clear()

    def _lock(self) -> None:
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        holder = self._lock_holder()
        if holder is not None and _holds(holder, me):
            print(
                f"warning: process {holder['pid']} on {holder['host']} also writes to {self.folder.address}; "
                "stop one of the two.",
                file=sys.stderr,
            )
        self.folder.write("_manifest/lock.json", _json({**me, "expires": time.time() + LOCK_SECONDS}))
        self._locked = time.monotonic()

    def _lock_holder(self) -> dict[str, Any] | None:
        """Who holds the folder; a lock that is gone, or that cannot be read, is nobody's: it must never block."""
        try:
            holder = json.loads(self.folder.read("_manifest/lock.json"))
            return {"host": str(holder["host"]), "pid": int(holder["pid"]), "expires": float(holder["expires"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None


def read_records(folder: Folder, problems: list[str] | None = None) -> dict[str, PartRecord]:
    """Every committed part by name, in the order of the names.

    Args:
        problems: takes a sentence for every file of records that cannot be read, and the others are read.

    Raises:
        ValueError, KeyError, TypeError, OSError: for the first such file, where `problems` is None.
    """
    records: dict[str, PartRecord] = {}
    for file in _record_files(folder):
        try:
            said = json.loads(folder.read(f"_manifest/{file}"))
            for record in said if isinstance(said, list) else [said]:
                part = PartRecord.parse(record)
                records[part.name] = part
        except (OSError, ValueError, KeyError, TypeError) as error:
            if problems is None:
                raise
            problems.append(f"_manifest/{file}: it cannot be read: {error}")
    return dict(sorted(records.items()))


def read_finished(address: str, made_by: str) -> dict[str, PartRecord]:
    """The parts of a finished folder. Raises UserError where it is missing or not finished."""
    folder = Folder(address)
    if not folder.exists("_SUCCESS"):
        state = "is not finished" if folder.exists("_manifest") else "does not exist"
        raise UserError(f"{address} {state}. Run `raymuse {made_by}` to the end first.")
    return read_records(folder)


def differing(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`field: old -> new` for every field of two nested configs that differs."""
    changed = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += differing(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} was {old!r} and is now {new!r}")
    return changed


def _record_files(folder: Folder) -> list[str]:
    """The files of `_manifest` that hold records, later ones over earlier: indexes in their order, then single ones."""
    names = [name for name in folder.names("_manifest") if name.endswith(".json") and name not in _NO_RECORDS]
    return sorted(names, key=lambda name: (name != _FIRST_INDEX, not _INDEX.fullmatch(name), name))


def _holds(holder: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """Whether another live process still claims the folder."""
    if holder["host"] == me["host"]:
        return holder["pid"] != me["pid"] and psutil.pid_exists(holder["pid"])
    return bool(holder["expires"] > time.time())


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
