"""Whether a token folder holds what its manifest says: files fetched once, a row group in memory, all problems told.

verdict = check_tokens("s3://bucket/tokens")
verdict.problems        # empty where all is well
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raymuse.config.errors import UserError
from raymuse.storage.checked_file import CheckedFile
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord, PartRecord, read_records
from raymuse.storage.rejects import REJECTS_SCHEMA
from raymuse.storage.token_parts import CHUNKS, HASHES, TABLES
from raymuse.storage.tokens import EMPTY, caption_id, captions_schema, tokens_schema

STAGE = "pretokenize"


@dataclass
class Verdict:
    """What was found in a token folder.

    Args:
        address: of the folder.
        finished: whether `_SUCCESS` stands there.
        parts: of the manifest, without the empty caption's.
        crops, captions, rejects: rows in the files that could be read.
        files, size: of the manifest, in bytes.
        problems: a sentence each, with the file.
        leftovers: files that nobody reads, of a writer that is under way or was killed; no problem.
    """

    address: str
    finished: bool
    parts: int = 0
    crops: int = 0
    captions: int = 0
    rejects: int = 0
    files: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line."""
        held = (
            f"{self.parts:,} parts, {self.crops:,} crops, {self.captions:,} captions, {self.rejects:,} rejects, "
            f"{self.files:,} files, {self.size:,} bytes"
        )
        if self.problems:
            count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            return f"{self.address}: {count}{'' if self.finished else ' (not finished)'}; {held}"
        return f"{self.address}: {'whole' if self.finished else 'not finished; whole so far'}: {held}"


def check_tokens(address: str) -> Verdict:
    """Read every file of a token folder, finished or not, and hold it against the manifest.

    Raises:
        UserError: there is no token folder.
    """
    folder = Folder(address)
    if not folder.exists("_manifest/config.json"):
        raise UserError(f"{address} is no token folder: it has no _manifest/config.json. `raymuse {STAGE}` writes one.")
    verdict = Verdict(address, folder.exists("_SUCCESS"))
    config = _read_json(folder, "_manifest/config.json", verdict.problems)
    if config.get("stage", STAGE) != STAGE:
        raise UserError(f"{address} is the output of `raymuse {config['stage']}`, and no token folder.")
    records = read_records(folder, verdict.problems)
    check = _Check(folder, config, verdict)
    for record in records.values():
        check.part(record)
    _check_totals(folder, records, verdict)
    _check_names(folder, records, verdict)
    return verdict


class _Check:
    """The checks of one part after another; `verdict` gathers what they find."""

    def __init__(self, folder: Folder, config: Mapping[str, Any], verdict: Verdict) -> None:
        self.folder, self.config, self.verdict = folder, config, verdict
        self.problems = verdict.problems
        self.widths: tuple[int, int] | None = None  # of states and pooled vectors: the first file's

    def part(self, record: PartRecord) -> None:
        self.verdict.parts += record.name != EMPTY
        files: dict[str, list[FileRecord]] = {table: [] for table in TABLES}
        for file in record.files:
            table = file.name.partition("/")[0]
            if table in files:
                files[table].append(file)
            else:
                self.problems.append(f"{file.name}: the manifest names it, and it is in none of {', '.join(TABLES)}")
        known = self._captions(record, files["captions"])
        self._tokens(record, files["tokens"], known)
        self._rejects(record, files["rejects"])

    def _open(self, file: FileRecord) -> CheckedFile:
        self.verdict.files += 1
        self.verdict.size += file.size
        return CheckedFile(self.folder, file, self.config, self.problems)

    def _captions(self, record: PartRecord, files: list[FileRecord]) -> pa.Array | None:
        """The caption ids of the part; None where a file of them could not be read."""
        ids: list[str] = []
        whole = True
        for file in files:
            before = len(ids)
            with self._open(file) as table:
                if table.opened and table.matches(self._captions_schema(table)):
                    for batch in table.batches(["caption_id", "caption"]):
                        keys, captions = (batch[name].to_pylist() for name in ("caption_id", "caption"))
                        wrong = [key for key, said in zip(keys, captions, strict=True) if key != caption_id(said)]
                        table.note("its caption_id is not its caption's sha256", len(wrong), wrong)
                        ids += keys
            table.count(len(ids) - before)
            whole &= table.sound
        doubled = [key for key, times in Counter(ids).items() if times > 1]
        if doubled:
            self.problems.append(f"{record.name}: {len(doubled)} captions stand there twice, such as {doubled[0]}")
        if record.name != EMPTY:
            self.verdict.captions += len(ids)
        elif whole and ids != [caption_id("")]:
            self.problems.append(f"captions/{EMPTY}.parquet: it must hold the empty caption, and nothing else")
        return pa.array(ids, pa.string()) if whole else None

    def _tokens(self, record: PartRecord, files: list[FileRecord], known: pa.Array | None) -> None:
        rows, whole = 0, True
        seen: Counter[tuple[str, int, bool]] = Counter()
        for file in files:
            before = rows
            with self._open(file) as table:
                if table.opened and table.matches(self._tokens_schema(table)):
                    for batch in table.batches(table.schema.names):
                        rows += len(batch)
                        self._token_rows(table, batch, known)
                        seen.update(zip(*(batch[name].to_pylist() for name in ("key", "crop", "flip")), strict=True))
            table.count(rows - before)
            whole &= table.sound
        doubled = [key for (key, _, _), times in seen.items() if times > 1]
        if doubled:
            self.problems.append(f"{record.name}: {len(doubled)} crops stand there twice, such as one of {doubled[0]}")
        if whole and rows != record.rows:
            self.problems.append(f"{record.name}: the manifest says {record.rows} rows, and tokens/ holds {rows}")
        self.verdict.crops += rows

    def _token_rows(self, table: CheckedFile, batch: pa.RecordBatch, known: pa.Array | None) -> None:
        keys = batch["key"]
        for name, size, low in (("image_ids", "codebook_size", ""), ("low_ids", "low_codebook_size", "low_")):
            if name not in batch.schema.names:
                continue
            if (codes := self.config.get(size)) is not None:
                ids = np.asarray(batch[name].flatten()).reshape(len(batch), -1)
                table.note_rows(f"{name} beyond the codebook of {codes}", (ids >= codes).any(axis=1), keys)
            for side in (f"{low}height", f"{low}width"):
                other = np.asarray(batch[side]) != table.first(side)
                table.note_rows(f"another {side} than the first row's", other, keys)
        lengths = np.asarray(pc.list_value_length(batch["caption_ids"]))
        table.note_rows("no caption", lengths == 0, keys)
        if known is not None:
            foreign = ~np.asarray(pc.is_in(batch["caption_ids"].flatten(), value_set=known))
            rows = np.zeros(len(batch), dtype=np.bool_)
            rows[np.repeat(np.arange(len(batch)), lengths)[foreign]] = True
            table.note_rows("a caption that captions/ does not hold", rows, keys)

    def _rejects(self, record: PartRecord, files: list[FileRecord]) -> None:
        rows, whole = 0, True
        for file in files:
            with self._open(file) as table:
                if table.opened and table.matches(REJECTS_SCHEMA):
                    rows += table.rows
            table.count(table.rows)
            whole &= table.sound
        if whole and rows != record.rejects:
            self.problems.append(
                f"{record.name}: the manifest says {record.rejects} rejects, and rejects/ holds {rows}"
            )
        self.verdict.rejects += rows

    def _tokens_schema(self, table: CheckedFile) -> pa.Schema:
        """What the columns must be, by the grid of the file's first row."""
        low = self.config.get("low_resolution") is not None
        return tokens_schema(table.grid("image_ids", ""), table.grid("low_ids", "low_") if low else None)

    def _captions_schema(self, table: CheckedFile) -> pa.Schema:
        """What the columns must be, by the config's text length and the widths of the first file."""
        length = int(self.config.get("text_length") or table.list_size("text_ids"))
        if self.config.get("text") == "ids":
            return captions_schema(length, None, None)
        self.widths = self.widths or (table.list_size("text_states") // length, table.list_size("pooled"))
        return captions_schema(length, *self.widths)


def _check_totals(folder: Folder, records: Mapping[str, PartRecord], verdict: Verdict) -> None:
    """The manifest against `_SUCCESS`, and the empty caption that training needs."""
    if EMPTY not in records and (verdict.finished or records):
        verdict.problems.append(f"captions/{EMPTY}.parquet: the manifest does not know it")
    if not verdict.finished:
        return
    said = _read_json(folder, "_SUCCESS", verdict.problems)
    parts = records.values()
    sums: dict[str, float] = {
        "parts": len(parts),
        "rows": sum(part.rows for part in parts),
        "rejects": sum(part.rejects for part in parts),
    }
    if isinstance(said.get("counts"), dict):
        said |= {f"counts.{name}": count for name, count in said["counts"].items()}
        for name, count in ((name, count) for part in parts for name, count in part.counts.items()):
            sums[f"counts.{name}"] = sums.get(f"counts.{name}", 0) + count
    for name, total in sums.items():
        if said and said.get(name) != total:
            verdict.problems.append(f"_SUCCESS: it says {name} {said.get(name)}, and the manifest adds up to {total}")


def _check_names(folder: Folder, records: Mapping[str, PartRecord], verdict: Verdict) -> None:
    """Files that the manifest does not know."""
    known = {file.name for record in records.values() for file in record.files}
    for path in (f"{table}/{name}" for table in TABLES for name in folder.names(table)):
        if path in known:
            continue
        if "/." in path or not verdict.finished:
            verdict.leftovers.append(path)
        else:
            verdict.problems.append(f"{path}: the manifest does not know it")
    verdict.leftovers += [f"{name}/" for name in (CHUNKS, HASHES) if folder.exists(name)]


def _read_json(folder: Folder, name: str, problems: list[str]) -> dict[str, Any]:
    """A JSON object; empty, and a problem, where it is none."""
    try:
        said = json.loads(folder.read(name))
        if isinstance(said, dict):
            return said
        problems.append(f"{name}: it is no JSON object")
    except (OSError, ValueError) as error:
        problems.append(f"{name}: it cannot be read: {error}")
    return {}
