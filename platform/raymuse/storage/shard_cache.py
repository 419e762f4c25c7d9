"""Copies of a finished folder's files on a machine's own disk: one a file, however many processes read it there.

FOLDER/<sha256>        a file by its content, so that trainings and data sets share them, and none can be stale
FOLDER/locks/<xx>      who copies a file whose sum begins so; the others wait
FOLDER/locks/room      who makes room
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raymuse.config.errors import UserError
from raymuse.config.nodes import ShardCacheConfig
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord

GIB = 2**30
ROOM = "room"


class ShardCache:
    """Reads through the copies, and makes those that are missing.

    Args:
        folder: on a disk of this machine.
        most: bytes that finished copies may take; what is being copied comes on top.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.root, self.most = folder, most
        self._sound: set[str] = set()  # copies that this process has held against their sums
        Folder(str(folder)).create()
        (folder / "locks").mkdir(exist_ok=True)

    @classmethod
    def of(cls, config: ShardCacheConfig | None) -> "ShardCache | None":
        """What the config asks for."""
        return None if config is None else cls(Path(config.folder), int(config.gib * GIB))

    def read(self, source: Folder, file: FileRecord) -> bytes:
        """The file, from its copy; it is copied before where it is not there, or is not what its record says.

        Raises:
            UserError: what the folder holds is not what its record says, or the disk is full.
        """
        data = self._copy(file)
        if data is not None:
            return data
        with self._locked(file.sha256[:2]):
            data = self._copy(file)  # another process may have made it meanwhile
            return self._fetch(source, file) if data is None else data

    def _copy(self, file: FileRecord) -> bytes | None:
        """What the copy holds; None where there is none, or a damaged one."""
        path = self.root / file.sha256
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if file.sha256 not in self._sound and hashlib.sha256(data).hexdigest() != file.sha256:
            return None
        if len(data) != file.size:
            return None
        self._sound.add(file.sha256)
        with suppress(FileNotFoundError):  # another process may have made room of it
            os.utime(path)  # it goes last when there must be room
        return data

    def _fetch(self, source: Folder, file: FileRecord) -> bytes:
        data = source.read(file.name)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise UserError(
                f"{source.address}/{file.name} is not what its manifest says ({len(data):,} bytes of {file.size:,}, or "
                "another sum): it was changed or cut. `raymuse tokens verify` tells which files are; pretokenize again."
            )
        if len(data) <= self.most:
            with self._locked(ROOM):
                self._make_room(len(data))
                Folder(str(self.root)).write_local(file.sha256, lambda path: path.write_bytes(data), durable=False)
        return data

    def _make_room(self, size: int) -> None:
        """Delete copies, those not read for longest first, until `size` bytes more are allowed; and leftovers."""
        entries = [entry for entry in os.scandir(self.root) if entry.is_file()]
        for leftover in (entry for entry in entries if entry.name.endswith(".partial")):
            os.unlink(leftover)  # of a process that was killed: whoever writes holds this lock
        copies = sorted((one.stat().st_mtime, one.stat().st_size, one.path) for one in entries if _is_copy(one))
        total = sum(taken for _, taken, _ in copies)
        for _, taken, path in copies:
            if total + size <= self.most:
                return
            os.unlink(path)
            total -= taken

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Inside, this process alone of the machine holds the lock; a killed one's is free again."""
        with (self.root / "locks" / name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_copy(entry: "os.DirEntry[str]") -> bool:
    return len(entry.name) == 64
