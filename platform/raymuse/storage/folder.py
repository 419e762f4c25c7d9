"""A folder, local or behind fsspec, whose files appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from raymuse.config.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Folder:
    """One address: a local path, or any fsspec address such as `s3://bucket/name`."""

    address: str

    @classmethod
    def holding(cls, address: str) -> tuple["Folder", str]:
        """The folder of a file, and the file's name in it."""
        folder, slash, name = address.rpartition("/")
        return cls(folder or slash or "."), name

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.address.rstrip('/')}/{name}")

    @property
    def local(self) -> Path | None:
        """The path, where the folder is on this machine's file system."""
        if "://" not in self.address:
            return Path(self.address)
        return Path(self.address.removeprefix("file://")) if self.address.startswith("file://") else None

    def create(self) -> None:
        """Make the folder. Raises UserError where it cannot be written."""
        if (path := self.local) is None:
            self._create_remote()
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write to {path}: {error.strerror or error}. Choose an output folder that you may write to."
            ) from error

    def _create_remote(self) -> None:
        """Write and delete a file: an object store has no folders, and says only so that it may be written."""
        try:
            self._filesystem().makedirs(self._path(""), exist_ok=True)
            self.write(f".writable-{os.getpid()}", b"")
            self.remove(f".writable-{os.getpid()}")
        except Exception as error:  # every store has errors of its own
            raise UserError(
                f"cannot write to {self.address}: {type(error).__name__}: {error}. "
                "Choose an output that you may write to, and check the credentials."
            ) from error

    def require_free(self, needed: int) -> None:
        """Raise UserError where a local disk has fewer than `needed` bytes left."""
        if (path := self.local) is None:
            return
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        if free < needed:
            raise UserError(
                f"{path} has {free / 2**30:.2f} GiB free and this needs about {needed / 2**30:.2f} GiB. "
                "Make room, or choose another output."
            )

    def require_local(self, why: str) -> None:
        """Raise UserError where the folder is not on a disk of this machine (or one that all nodes mount)."""
        if self.local is None:
            raise UserError(f"{self.address}: this output must be a folder on a disk that every node sees: {why}.")

    def exists(self, name: str = "") -> bool:
        return bool(self._filesystem().exists(self._path(name)))

    def names(self, name: str = "") -> list[str]:
        """Names of the files and folders directly inside, sorted; empty where there is no such folder."""
        filesystem = self._filesystem()
        path = self._path(name)
        if not filesystem.exists(path):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))

    def read(self, name: str) -> bytes:
        return bytes(self._filesystem().cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        """A file, to read a little at a time."""
        return cast(BinaryIO, self._filesystem().open(self._path(name), "rb"))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write the file whole: temporary name, fsync, rename locally; a single PUT elsewhere.

        Args:
            name: of the file in this folder.
            data: its bytes.
            durable: False leaves the fsync away, for what a crash of the machine may take.
        """
        if self.local is None:
            self._filesystem().pipe_file(self._path(name), data)
        else:
            self.write_local(name, lambda path: path.write_bytes(data), durable=durable)

    def write_with(self, name: str, fill: Callable[[Path], object]) -> None:
        """Let `fill` write a local file and put it in place whole, wherever the folder is."""
        if self.local is not None:
            self.write_local(name, fill)
            return
        with tempfile.TemporaryDirectory() as scratch:
            fill(Path(scratch, "file"))
            self._filesystem().put_file(str(Path(scratch, "file")), self._path(name))

    def write_local(self, name: str, fill: Callable[[Path], object], *, durable: bool = True) -> Path:
        """Let `fill` write a temporary file on the local disk, then move it into place.

        Raises:
            UserError: the disk is full, or the user's share of it. Nothing of the file stays behind.
        """
        if self.local is None:
            raise UserError(f"{self.address} is not on this machine's disk, which this stage needs.")
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
        try:
            fill(partial)
            if durable:
                _sync(partial)
            partial.rename(final)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"there is no room left for {final} ({os.strerror(error.errno)}). Make room there and run the same "
                "command again: what is finished is kept."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        if durable:
            _sync(final.parent)
        return final

    def remove(self, name: str) -> None:
        """Delete a file or folder inside; nothing happens where it is not there."""
        if self.exists(name):
            self._filesystem().rm(self._path(name), recursive=True)

    def remove_files(self, names: Sequence[str]) -> None:
        """Delete files inside, in as few requests as the store allows; those that are gone already are no error."""
        if (root := self.local) is not None:
            for name in names:
                (root / name).unlink(missing_ok=True)
        elif names:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem().rm([self._path(name) for name in names])

    def remove_partials(self) -> None:
        """Delete the temporary files of writers that were killed. Only when nobody writes here any more."""
        if self.local is not None:
            for path in self.local.rglob(".*.partial"):
                path.unlink(missing_ok=True)

    def _filesystem(self) -> Any:
        """The file system, without the listings it keeps: others write here too."""
        filesystem = fsspec.core.url_to_fs(self.address)[0]
        filesystem.invalidate_cache()
        return filesystem

    def _path(self, name: str) -> str:
        root = str(fsspec.core.url_to_fs(self.address)[1])
        return f"{root.rstrip('/')}/{name}" if name else root


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
