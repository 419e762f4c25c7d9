"""What a batch of pictures has done so far, and whether its folder holds what its manifest says."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.storage.folder import Folder
from raymuse.storage.generated import PictureRow, rows_table
from raymuse.storage.manifest import PartRecord, read_records

PLAN = "plan.json"
STAGE = "generate"


@dataclass
class BatchState:
    """A folder of drawn pictures.

    Args:
        address: of the folder.
        finished: whether `_SUCCESS` stands there.
        planned: pictures that are asked for; None in folders that do not say.
        parts, drawn, failed: of the manifest.
        files, size: of the manifest, in bytes.
        reasons: of the failures, how many each.
        problems: a sentence each, with the file.
        leftovers: files that nobody reads, of a writer that is under way or was killed; no problem.
    """

    address: str
    finished: bool
    planned: int | None
    parts: int = 0
    drawn: int = 0
    failed: int = 0
    files: int = 0
    size: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line, and one a reason of failures."""
        state = "finished" if self.finished else "not finished"
        if self.problems:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            state = f"{count} ({state})"
        done = f"{self.drawn:,} pictures" if self.planned is None else f"{self.drawn:,} of {self.planned:,} pictures"
        lines = [
            f"{self.address}: {state}: {done}, {self.failed:,} failed, {self.parts:,} parts, {self.files:,} files, "
            f"{self.size:,} bytes"
        ]
        return "\n".join([*lines, *(f"  {reason}: {count:,}" for reason, count in self.reasons.most_common())])


def batch_state(address: str) -> BatchState:
    """What the manifest says, and why pictures failed; no picture is read.

    Raises:
        UserError: there is no such folder.
    """
    folder = Folder(address)
    if not folder.exists("_manifest/config.json"):
        raise UserError(f"{address} holds no batch: it has no _manifest/config.json. `raymuse {STAGE}` writes one.")
    config = json.loads(folder.read("_manifest/config.json"))
    if config.get("stage") != STAGE:
        raise UserError(f"{address} is the output of `raymuse {config.get('stage')}`, and no batch of pictures.")
    planned = json.loads(folder.read(PLAN))["pictures"] if folder.exists(PLAN) else None
    state = BatchState(address, folder.exists("_SUCCESS"), planned)
    for part in read_records(folder, state.problems).values():
        state.parts += 1
        state.drawn += part.rows
        state.failed += part.rejects
        state.files += len(part.files)
        state.size += sum(file.size for file in part.files)
        for file in part.files:
            if file.name.startswith("rejects/"):
                _count_reasons(folder, file.name, state)
    return state


def _count_reasons(folder: Folder, name: str, state: BatchState) -> None:
    try:
        table = pq.read_table(io.BytesIO(folder.read(name)), columns=["reason"])
    except (OSError, pa.ArrowException) as error:
        state.problems.append(f"{name}: it cannot be read: {error}")
    else:
        state.reasons.update(table["reason"].to_pylist())


def check_batch(address: str) -> BatchState:
    """Read every file of a batch, finished or not, and hold it against the manifest: sums, counts, rows and pictures.

    Raises:
        UserError: there is no such folder.
    """
    state, folder = batch_state(address), Folder(address)
    records = read_records(folder, [])
    seen: Counter[str] = Counter()
    for part in records.values():
        _check_part(folder, part, state, seen)
    state.problems += [f"{key}: it stands in {count} parts" for key, count in seen.items() if count > 1]
    if state.finished:
        _check_table(folder, state)
        if state.planned is not None and state.planned != state.drawn + state.failed:
            state.problems.append(
                f"{state.planned} pictures are planned, {state.drawn} drawn and {state.failed} failed"
            )
    known = {file.name for part in records.values() for file in part.files}
    found = [f"{place}/{name}" for place in ("parts", "rows", "rejects") for name in folder.names(place)]
    state.leftovers = [name for name in found if name not in known]
    return state


def _check_part(folder: Folder, part: PartRecord, state: BatchState, seen: Counter[str]) -> None:
    tables: dict[str, pa.Table] = {}
    pictures: dict[str, dict[str, Any]] = {}
    sound = True
    for file in part.files:
        try:
            data = folder.read(file.name)
        except OSError as error:
            state.problems.append(f"{file.name}: it cannot be read: {error}")
            sound = False
            continue
        if (len(data), hashlib.sha256(data).hexdigest()) != (file.size, file.sha256):
            state.problems.append(f"{file.name}: {len(data)} bytes with another sum than the manifest's {file.size}")
            sound = False
        elif file.name.endswith(".tar"):
            pictures = _pictures(file.name, data, state.problems)
        else:
            tables[file.name.partition("/")[0]] = pq.read_table(io.BytesIO(data))
    if not sound:
        return
    rows = tables["rows"].to_pylist() if "rows" in tables else []
    rejects = tables["rejects"].to_pylist() if "rejects" in tables else []
    seen.update(row["key"] for row in rows)
    if (len(rows), len(rejects)) != (part.rows, part.rejects):
        counted = f"{len(rows)} rows and {len(rejects)} rejects"
        state.problems.append(f"{part.name}: {counted}, the manifest says {part.rows} and {part.rejects}")
    said = rows_table([PictureRow(**facts) for facts in pictures.values()]).to_pylist()
    if sorted(rows, key=_key) != sorted(said, key=_key):
        state.problems.append(f"{part.name}: the rows and the pictures in its tar differ")


def _key(row: dict[str, Any]) -> str:
    return str(row["key"])


def _pictures(name: str, data: bytes, problems: list[str]) -> dict[str, dict[str, Any]]:
    """What the tar says of each of its pictures, every one of which must be there and of its size."""
    said: dict[str, dict[str, Any]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None, f"{member.name} is a plain file: we wrote it"
            if member.name.endswith(".json"):
                said[member.name.removesuffix(".json")] = json.loads(stream.read())
            else:
                with Image.open(stream) as picture:
                    picture.load()
                    sizes[member.name.removesuffix(".png")] = picture.size
    bases = {key for key in sizes if key.endswith(".base")}
    if bases and bases != {f"{key}.base" for key in said}:
        problems.append(f"{name}: {len(bases)} base pictures for {len(said)} pictures")
    for key, row in said.items():
        if sizes.get(key) != (row["width"], row["height"]):
            problems.append(f"{name}: {key}.png is {sizes.get(key, 'missing')}, not {row['width']} x {row['height']}")
    return said


def _check_table(folder: Folder, state: BatchState) -> None:
    """manifest.parquet holds a row a picture, in order."""
    try:
        table = pq.read_table(io.BytesIO(folder.read("manifest.parquet")), columns=["index", "sample"])
    except (OSError, pa.ArrowException) as error:
        state.problems.append(f"manifest.parquet: it cannot be read: {error}")
        return
    places = list(zip(*table.to_pydict().values(), strict=True))
    if len(places) != state.drawn:
        state.problems.append(f"manifest.parquet: {len(places)} rows for {state.drawn} pictures")
    if places != sorted(set(places)):
        state.problems.append("manifest.parquet: the rows are not in the order of the prompts, once each")
