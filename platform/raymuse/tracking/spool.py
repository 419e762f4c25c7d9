"""What was logged and not yet sent: a folder of segments, each written by one process about one run.

A segment is `run.json` (which run, and how to make it), `records.jsonl` (one record a line, in order), `sent` (how many
bytes of that the server has acknowledged), `files/` (copies of what is to be uploaded) and `lock`, which the writing
process holds. Whoever finds a segment whose lock is free may send the rest: its writer is gone.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]

READ_BYTES = 128 << 10
COMPACT_BYTES = 4 << 20


@dataclass(frozen=True)
class Identity:
    """Which run, and all that is needed to make it once the server answers.

    Attributes:
        key: a name of our own, kept as a tag of the run, by which it is found before its `run_id` is known.
        parent: the run that this one is part of.
        opens: whether this process may create the run; the others wait until it is there.
        resumes: whether the run has been there before and is to be set running again.
        born: milliseconds since 1970, the start time of a run that is created late.
    """

    uri: str
    experiment: str
    name: str
    key: str
    run_id: str | None = None
    experiment_id: str | None = None
    parent: "Identity | None" = None
    tags: dict[str, str] = field(default_factory=dict, hash=False)
    opens: bool = False
    resumes: bool = False
    born: int = 0

    @property
    def names(self) -> set[str]:
        """The key and the id: two identities that share one are the same run."""
        return {self.key} if self.run_id is None else {self.key, self.run_id}

    @staticmethod
    def read(values: dict[str, Any]) -> "Identity":
        """The inverse of `dataclasses.asdict`."""
        parent = values["parent"]
        return Identity(**values | {"parent": None if parent is None else Identity.read(parent)})


class Segment:
    """The records of one process about one run. `create` makes one, `adopt` takes over one whose writer is gone."""

    def __init__(self, folder: Path, identity: Identity, lock: int, *, adopted: bool) -> None:
        self.folder, self.identity, self.adopted = folder, identity, adopted
        self._lock = lock
        self._guard = threading.Lock()  # append and compact exclude each other
        self._records = os.open(folder / "records.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if adopted:
            self._drop_torn_line()
        self._sent = _read_offset(folder, self._size())

    @staticmethod
    def create(spool: Path, identity: Identity) -> "Segment":
        """Makes an empty segment; it appears in the spool locked, under a name that sorts by time."""
        spool.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        made = spool / f".{name}"
        (made / "files").mkdir(parents=True)
        lock = os.open(made / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(made / "run.json", json.dumps(asdict(identity)))
        made.rename(spool / name)
        return Segment(spool / name, identity, lock, adopted=False)

    @staticmethod
    def adopt(folder: Path) -> "Segment | None":
        """Takes a segment over, or returns `None` while its writer lives or when it has been sent and removed."""
        try:
            lock = os.open(folder / "lock", os.O_WRONLY)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return None
        identity = Segment.peek(folder)  # under the lock: its writer may have got to know more since
        if identity is None:
            os.close(lock)
            return None
        return Segment(folder, identity, lock, adopted=True)

    @staticmethod
    def peek(folder: Path) -> Identity | None:
        """Whose records a segment holds, or `None` where it is gone or unreadable."""
        try:
            return Identity.read(json.loads((folder / "run.json").read_text()))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def append(self, record: Record) -> None:
        """Adds a record; once this returns, a killed process does not lose it."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._guard:
            size = self._size()
            try:
                if os.write(self._records, line) != len(line):
                    raise OSError(f"the disk of {self.folder} is full")
            except OSError:
                os.truncate(self._records, size)  # half a line would spoil the next
                raise

    def stash(self, record: Record, name: str, write: Callable[[Path], object]) -> None:
        """Adds a record with a file, which `write` makes; the record's `copy` is its path within the segment."""
        folder = self.folder / "files" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        write(folder / name)
        self.append(record | {"copy": (folder / name).relative_to(self.folder).as_posix()})

    def pending(self) -> list[tuple[Record, int]]:
        """The next unsent records, each with the offset behind it; a line that was cut off by a kill is not one."""
        with open(self.folder / "records.jsonl", "rb") as source:
            source.seek(self._sent)
            block = source.read(READ_BYTES)
            if b"\n" not in block:
                block += source.readline()
        records, offset = [], self._sent
        for line in block.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            records.append((_parse(line), offset))
        return records

    def acknowledge(self, records: list[Record], offset: int) -> None:
        """Notes that everything before `offset` has arrived, and drops the copies of the files in it."""
        self._sent = offset
        _write(self.folder / "sent", str(offset))
        for record in records:
            if "copy" in record:
                shutil.rmtree((self.folder / record["copy"]).parent, ignore_errors=True)
        if offset > COMPACT_BYTES:
            self._compact()

    def identify(self, **changes: Any) -> None:
        """Notes what became known of the run (its id), for whoever goes on after us."""
        self.identity = replace(self.identity, **changes)
        _write(self.folder / "run.json", json.dumps(asdict(self.identity)))

    def set_aside(self, record: Record, why: str) -> Path:
        """Keeps a record that the server will never take."""
        path = self.folder / "refused.jsonl"
        with open(path, "a") as refused:
            refused.write(json.dumps({"why": why, "record": record}) + "\n")
        if "copy" in record:  # out of the reach of acknowledge
            kept = self.folder / "refused" / uuid.uuid4().hex
            kept.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):
                (self.folder / record["copy"]).parent.rename(kept)
        return path

    @property
    def done(self) -> bool:
        """Whether the run is known and all records have arrived."""
        known = self.identity.run_id is not None and not self.identity.resumes
        return known and self._sent >= self._size()

    def close(self) -> None:
        """Lets go of the segment; it is removed when nothing in it is left to send or to look at."""
        if self.done and not (self.folder / "refused.jsonl").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._records)
        os.close(self._lock)

    def _size(self) -> int:
        return os.fstat(self._records).st_size

    def _drop_torn_line(self) -> None:
        """A line without its end was never said to be kept: its writer was killed in the middle of it."""
        whole = (self.folder / "records.jsonl").read_bytes()
        os.truncate(self._records, whole.rfind(b"\n") + 1)

    def _compact(self) -> None:
        with self._guard:
            if self._sent == self._size():
                # In this order: a kill between the two sends records again, which does no harm.
                self._sent = 0
                _write(self.folder / "sent", "0")
                os.truncate(self._records, 0)


def segments(spool: Path) -> list[Path]:
    """The segments of a spool, oldest first."""
    return sorted(path for path in spool.glob("[0-9]*") if path.is_dir())


def _parse(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {"do": "damaged", "line": line.decode(errors="replace")}


def _read_offset(folder: Path, size: int) -> int:
    try:
        offset = int((folder / "sent").read_text())
    except (OSError, ValueError):
        return 0
    return offset if offset <= size else 0


def _write(path: Path, text: str) -> None:
    """Replaces a small file in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)
