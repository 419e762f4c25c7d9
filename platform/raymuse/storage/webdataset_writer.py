"""Writing WebDataset tars in img2dataset's layout: the same samples give the same bytes."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from PIL import Image

from raymuse.storage.folder import Folder

ImageFormat = Literal["png", "jpg", "webp"]
_ENCODERS: dict[ImageFormat, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True},
}


def write_shard(
    path: str | Path,
    samples: Iterable[tuple[str, Image.Image, str, Mapping[str, Any]]],
    image_format: ImageFormat = "png",
) -> int:
    """Write one tar of `key.png`, `key.txt`, `key.json`, whole or not at all.

    Args:
        path: the tar, local or any fsspec address.
        samples: (key, picture, caption, metadata). The .json holds img2dataset's fields (caption, key, status, width,
            height, original_width, original_height), each of which the metadata may overrule, and the metadata.
        image_format: png and webp are lossless, jpg has quality 95.

    Returns:
        The number of samples.

    Raises:
        ValueError: a key comes twice, is empty, or holds a dot or an absolute or upward path.
    """
    written = 0

    def members() -> Iterator[tuple[str, bytes]]:
        nonlocal written
        keys: set[str] = set()
        for key, image, caption, metadata in samples:
            _check_key(key, keys)
            yield f"{key}.{image_format}", encode(image, image_format)
            yield f"{key}.txt", caption.encode("utf-8")
            yield f"{key}.json", _fields(key, image, caption, metadata)
            written += 1

    write_tar(path, members())
    return written


def write_tar(path: str | Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, bytes) members into one tar, whole or not at all; times, owners and modes are constants.

    Locally a temporary file in the same folder, synced, then renamed; elsewhere a single upload.
    """
    folder, name = Folder.holding(str(path))
    folder.write_with(name, lambda partial: _fill(partial, members))


def encode(image: Image.Image, image_format: ImageFormat = "png") -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, **_ENCODERS[image_format])
    return buffer.getvalue()


def _fill(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with path.open("wb") as stream:
        _write_members(stream, members)
        stream.flush()
        os.fsync(stream.fileno())


def _write_members(stream: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the mode 0644 unless said
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _check_key(key: str, keys: set[str]) -> None:
    parts = key.split("/")
    if not all(parts) or "." in key:
        raise ValueError(f"the key {key!r} is empty, or holds a dot or an empty folder name: WebDataset splits at dots")
    if key in keys:
        raise ValueError(f"the key {key!r} comes twice in one shard")
    keys.add(key)


def _fields(key: str, image: Image.Image, caption: str, metadata: Mapping[str, Any]) -> bytes:
    fields = {
        "caption": caption,
        "key": key,
        "status": "success",
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        **metadata,
    }
    return json.dumps(fields, sort_keys=True, ensure_ascii=False).encode("utf-8")
