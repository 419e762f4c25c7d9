"""Model folders in object stores: fetched once to this machine, and again where they have changed."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

from raymuse.config.errors import UserError

_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated", "created")
"""What the file systems of fsspec say of a file's contents, or else of when they were written."""


def fetched(address: str, cache: Path | None = None) -> Path:
    """The folder at an fsspec address (`s3://bucket/model`), as a folder of this machine.

    Its name in the cache is a fingerprint of the address and of every file's name, size and stamp, so that one listing
    says whether it is there already.

    Raises:
        UserError: the store cannot be reached, or holds nothing there.
    """
    try:
        files, path = fsspec.core.url_to_fs(address)
        files.invalidate_cache()
        found: dict[str, Any] = files.find(path, detail=True)
    except Exception as error:  # every store has errors of its own
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{address} cannot be reached: {said} Check the address and the credentials.") from error
    if not found:
        raise UserError(f"there is no model at {address}: the store holds nothing there.")
    root = (cache or default_cache()) / _fingerprint(address, found)
    if not root.exists():
        _fetch(files, path, found, root)
    return root


def default_cache() -> Path:
    """A folder of this user, after the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "raymuse" / "remote"


def _fingerprint(address: str, found: dict[str, Any]) -> str:
    stamps = ("", *(str(facts[name]) for facts in found.values() for name in _STAMPS if facts.get(name) is not None))
    facts = [address, [(name, entry.get("size")) for name, entry in sorted(found.items())], stamps]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _fetch(files: Any, path: str, found: dict[str, Any], root: Path) -> None:
    """All files, to a folder that appears whole; of two that fetch at a time one wins."""
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        for name in found:
            place = partial / name.removeprefix(path).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(place))
        if not root.exists():
            partial.rename(root)
    except OSError as error:
        if not root.exists():
            raise UserError(f"{path} cannot be fetched to {root.parent}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
