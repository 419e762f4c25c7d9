"""Reading files at local paths and fsspec addresses. Local files go past fsspec: it expands `*` and `::` in names."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, Any, Literal

import fsspec

BUFFER_BYTES = 1 << 20


def local_path(address: str) -> Path | None:
    """The path of an address on this machine's file system; None for any other address."""
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return None if "://" in address else Path(address)


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def kind_of(address: str) -> Literal["file", "folder"] | None:
    """What stands at the address; None where nothing does."""
    if (path := local_path(address)) is not None:
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    filesystem, remote = _remote(address)
    return "folder" if filesystem.isdir(remote) else "file" if filesystem.isfile(remote) else None


def list_files(folder: str) -> list[str]:
    """Files at any depth, relative to the folder, sorted; hidden files and folders are left out."""
    if (path := local_path(folder)) is not None:
        names = _walk(path)
    else:
        filesystem, remote = _remote(folder)
        root = remote.rstrip("/") + "/"
        names = [str(name).removeprefix(root) for name in filesystem.find(remote)]
    return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def read_bytes(address: str) -> bytes:
    """The whole file. Raises OSError."""
    if (path := local_path(address)) is not None:
        return path.read_bytes()
    filesystem, remote = _remote(address)
    return bytes(filesystem.cat_file(remote))


def read_span(address: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises OSError."""
    path = local_path(address)
    if path is None:
        filesystem, remote = _remote(address)
        return bytes(filesystem.cat_file(remote, start=offset, end=offset + size))
    # Opened for every read: 10 microseconds, and so there is nothing to share, to pickle or to run out of.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def size_of(address: str) -> int:
    """Bytes of a file. Raises OSError."""
    if (path := local_path(address)) is not None:
        return path.stat().st_size
    filesystem, remote = _remote(address)
    return int(filesystem.size(remote))


def open_seekable(address: str) -> IO[bytes]:
    """The file, open for reading at any place. A remote one is first copied, in one stream, to an unnamed file."""
    if (path := local_path(address)) is not None:
        return path.open("rb", buffering=BUFFER_BYTES)
    filesystem, remote = _remote(address)
    copy = tempfile.TemporaryFile(buffering=BUFFER_BYTES)  # noqa: SIM115 - the caller closes it
    try:
        with filesystem.open(remote, "rb") as stream:
            shutil.copyfileobj(stream, copy, 8 * BUFFER_BYTES)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy


def glob(pattern: str) -> list[str]:
    """Addresses of the files that match, sorted."""
    filesystem, path = fsspec.core.url_to_fs(pattern)
    remote = local_path(pattern) is None
    return sorted(str(filesystem.unstrip_protocol(name) if remote else name) for name in filesystem.glob(path))


def _walk(folder: Path) -> list[str]:
    return [
        os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
        for parent, _, names in os.walk(folder)
        for name in names
    ]


def _remote(address: str) -> tuple[Any, str]:
    filesystem, path = fsspec.core.url_to_fs(address)
    return filesystem, str(path)
