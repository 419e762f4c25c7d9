"""Generated pictures on disk: parts, the manifest table, and reading them back.

parts/part-000000.tar     000000123-0.png, 000000123-0.base.png (a cascade's base), 000000123-0.json
rows/part-000000.parquet  one row a picture; joined into manifest.parquet at the end
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from raymuse.storage.folder import Folder

ROWS_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("sample", pa.int32()),
        ("key", pa.string()),
        ("source_key", pa.string()),
        ("prompt", pa.string()),
        ("negative", pa.string()),
        ("seed", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("steps", pa.int32()),
        ("guidance", pa.float32()),
        ("temperature", pa.float32()),
        ("batch_size", pa.int32()),
        ("model", pa.string()),
        ("part", pa.string()),
        ("task", pa.string()),
        ("precision", pa.string()),
        ("sampling", pa.string()),
        ("superres_sampling", pa.string()),
    ]
)


@dataclass(frozen=True)
class PictureRow:
    """How one picture was made: a row of manifest.parquet."""

    index: int
    sample: int
    key: str
    source_key: str
    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    temperature: float
    batch_size: int
    model: str
    part: str
    task: str = ""
    precision: str = "fp32"
    sampling: str = ""
    superres_sampling: str = ""


@dataclass(frozen=True)
class Generated:
    """A picture read back, with the base's own where it was kept: uint8 (H, W, 3)."""

    row: PictureRow
    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8] | None


def rows_table(rows: list[PictureRow]) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=ROWS_SCHEMA)


def read_part(folder: Folder, part: str) -> Iterator[Generated]:
    """The pictures of a part, in its order."""
    with tarfile.open(fileobj=io.BytesIO(folder.read(f"parts/{part}.tar"))) as tar:
        members = {member.name: member for member in tar.getmembers()}
        for name in members:
            if not name.endswith(".json"):
                continue
            key = name.removesuffix(".json")
            record = json.loads(_bytes(tar, members[name]))
            base = members.get(f"{key}.base.png")
            yield Generated(
                PictureRow(**record),
                _pixels(_bytes(tar, members[f"{key}.png"])),
                None if base is None else _pixels(_bytes(tar, base)),
            )


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None, f"{member.name} is a plain file: we wrote it"
    return stream.read()


def _pixels(data: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.uint8)
