"""Reading files at local paths and fsspec addresses. Local files go past fsspec: it expands `*` and `::` in names."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Literal

import fsspec

from raymuse.config.errors import UserError

BUFFER_BYTES = 1 << 20
BLOCK_BYTES = 8 << 20  # fetched at once of a remote file that is read in parts


def local_path(address: str) -> Path | None:
    """The path of an address on this machine's file system; None for any other address."""
    if address.startswith("file://"):
        return Path(address.removeprefix("file://"))
    return None if "://" in address else Path(address)


def join(folder: str, name: str) -> str:
    """The address of a name in a folder; "" is where the program runs."""
    return f"{folder.rstrip('/')}/{name}" if folder else name


def kind_of(address: str) -> Literal["file", "folder"] | None:
    """What stands at the address now; None where nothing does.

    Raises:
        UserError: a store that cannot be reached, or whose package is not installed.
    """
    if (path := local_path(address)) is not None:
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    try:
        filesystem, remote = _fresh(address)
        return "folder" if filesystem.isdir(remote) else "file" if filesystem.isfile(remote) else None
    except UserError:
        raise
    except FileNotFoundError:
        return None
    except Exception as error:  # every store has errors of its own
        raise UserError(
            f"{address} cannot be reached: {type(error).__name__}: {error}. Check the address, the network and the "
            "credentials."
        ) from error


def present(addresses: Iterable[str]) -> set[str]:
    """Those at which something stands. A remote folder is listed once, however many of its files are asked for."""
    found: set[str] = set()
    folders: dict[str, list[str]] = {}
    for address in addresses:
        if (path := local_path(address)) is None:
            folders.setdefault(address.rpartition("/")[0], []).append(address)
        elif path.exists():
            found.add(address)
    for folder, wanted in folders.items():
        there = _names(folder)
        found |= {address for address in wanted if address.rpartition("/")[2] in there or kind_of(address)}
    return found


def list_files(folder: str) -> list[str]:
    """Files at any depth, relative to the folder, sorted; hidden files and folders are left out."""
    if (path := local_path(folder)) is not None:
        names = _walk(path)
    else:
        filesystem, remote = _fresh(folder)
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


def open_in_parts(address: str) -> IO[bytes]:
    """The file, open for reading at any place. Of a remote one only the blocks that are read are fetched."""
    if (path := local_path(address)) is not None:
        return path.open("rb", buffering=BUFFER_BYTES)
    filesystem, remote = _remote(address)
    stream: IO[bytes] = filesystem.open(remote, "rb", block_size=BLOCK_BYTES)
    return stream


def glob(pattern: str) -> list[str]:
    """Addresses of the files that match, sorted."""
    filesystem, path = _fresh(pattern)
    remote = local_path(pattern) is None
    return sorted(str(filesystem.unstrip_protocol(name) if remote else name) for name in filesystem.glob(path))


def is_final(error: OSError, address: str) -> bool:
    """Whether trying again cannot help: no such file, a name that no file can have, or one on a disk that is not ours.

    A store that refuses is not final: it says the same where a token has expired or a clock is wrong, and would then
    refuse everything that is still to come.
    """
    if isinstance(error, PermissionError):
        return local_path(address) is not None
    gone = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, gone) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


def _names(folder: str) -> set[str]:
    """What a remote folder holds; nothing where it cannot be listed, as on a plain web server."""
    try:
        filesystem, remote = _fresh(folder)
        return {str(name).rstrip("/").rpartition("/")[2] for name in filesystem.ls(remote, detail=False)}
    except Exception:  # every store has errors of its own; whoever asks then tries file by file
        return set()


def _walk(folder: Path) -> list[str]:
    return [
        os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
        for parent, _, names in os.walk(folder)
        for name in names
    ]


def _fresh(address: str) -> tuple[Any, str]:
    """As `_remote`, without the listings that fsspec keeps: a resume in the same process asks what is there now."""
    filesystem, path = _remote(address)
    filesystem.invalidate_cache()
    return filesystem, path


def _remote(address: str) -> tuple[Any, str]:
    """Raises UserError where a package is missing, FileNotFoundError for a protocol that nobody knows."""
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
        install = 'pip install "raymuse[s3]"' if address.startswith(("s3://", "s3a://")) else "install it with pip"
        raise UserError(f"{address} needs a package that is not installed ({error}): {install}.") from error
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, f"no file system of this kind ({error})", address) from error
    return filesystem, str(path)
