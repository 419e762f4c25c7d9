"""One Parquet file of a part, held against its record: what is wrong with it becomes sentences, never an error.

It is fetched once: a remote file to the disk of this machine, where its sum is taken and its rows are read.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raymuse.storage import sources
from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord

_BLOCK = 1 << 20
_ROWS = 1024
_FACTS = "raymuse."  # before the names of a file's metadata


class CheckedFile:
    """Read inside `with`; at its end the problems are complete.

    Args:
        folder: that holds it.
        file: what the manifest says of it.
        made_with: the folder's config, for the file's own metadata to agree with.
        problems: takes a sentence for everything that is wrong.

    Attributes:
        opened: whether its bytes are those of the manifest, and Parquet.
        sound: whether its columns also are what they must be, and could be read to the end.
        schema: as found; empty where it could not be opened.
        rows: by its footer.
    """

    def __init__(self, folder: Folder, file: FileRecord, made_with: Mapping[str, Any], problems: list[str]) -> None:
        self.file, self.made_with, self.problems = file, made_with, problems
        self.address = (folder / file.name).address
        self.schema = pa.schema([])
        self.rows = 0
        self.sound = self.opened = False
        self._stream: IO[bytes] | None = None
        self._notes: dict[str, tuple[int, str]] = {}
        self._firsts: dict[str, int] = {}

    def __enter__(self) -> "CheckedFile":
        if self._is_as_recorded():
            try:
                self.parquet = pq.ParquetFile(self._stream)
                self.schema, self.rows = self.parquet.schema_arrow, self.parquet.metadata.num_rows
                self.opened = True
            except (pa.ArrowException, OSError) as error:
                self._say(f"it is no Parquet file: {error}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if self._stream is not None:
            self._stream.close()
        unreadable = isinstance(error, pa.ArrowException | OSError)
        if unreadable:
            self.sound = False
            self._say(f"it cannot be read: {error}")
        for what, (count, example) in self._notes.items():
            self._say(f"{count} {'row' if count == 1 else 'rows'}: {what}, such as {example}")
        return unreadable

    def matches(self, expected: pa.Schema) -> bool:
        """Whether the columns are as expected, and its metadata names this folder's encoders."""
        found = {field.name: field.type for field in self.schema}
        wanted = {field.name: field.type for field in expected}
        problems = [f"it lacks the column {name}" for name in wanted if name not in found]
        problems += [f"it has a column {name} that has no place there" for name in found if name not in wanted]
        problems += [
            f"its column {name} is {_plain(found[name])}, and must be {_plain(wanted[name])}"
            for name in wanted
            if name in found and found[name] != wanted[name]  # whatever Parquet calls the items of a list
        ]
        if not problems and list(found) != list(wanted):
            problems.append("its columns stand in another order")
        for problem in [*problems, *self._foreign()]:
            self._say(problem)
        self.sound = not problems
        return self.sound

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows, a few at a time; rows with a null are a problem, and are left out."""
        for batch in self.parquet.iter_batches(_ROWS, columns=list(columns)):
            holes = [name for name in columns if batch[name].null_count]
            if holes:
                self.note(f"nothing in {', '.join(holes)}", max(batch[name].null_count for name in holes), ["null"])
            yield batch.drop_null() if holes else batch

    def first(self, column: str) -> int:
        """A column's value in the first row; 0 where there is none."""
        if column not in self._firsts:
            self._firsts[column] = 0
            if self.rows and column in self.schema.names:
                batch = next(self.parquet.iter_batches(1, columns=[column]))
                self._firsts[column] = int(batch[column][0].as_py() or 0)
        return self._firsts[column]

    def grid(self, column: str, prefix: str) -> tuple[int, int]:
        """Height and width that the first row says of a column of ids; of no rows, all ids in one line."""
        height, width = self.first(f"{prefix}height"), self.first(f"{prefix}width")
        return (height, width) if height * width else (1, self.list_size(column))

    def list_size(self, column: str) -> int:
        """Length of a fixed-size list; 1 where the column is none, which `matches` then tells."""
        if column not in self.schema.names or not pa.types.is_fixed_size_list(self.schema.field(column).type):
            return 1
        return int(self.schema.field(column).type.list_size)

    def note(self, what: str, count: int, examples: Sequence[str]) -> None:
        """Remember that `count` rows have the same thing wrong."""
        if count:
            before, example = self._notes.get(what, (0, str(examples[0])))
            self._notes[what] = (before + count, example)

    def note_rows(self, what: str, wrong: NDArray[np.bool_], keys: pa.Array) -> None:
        """The same for the rows of a batch that are `wrong` (N,), named by their keys."""
        if wrong.any():
            self.note(what, int(wrong.sum()), [keys[int(wrong.argmax())].as_py()])

    def count(self, rows: int) -> None:
        """Hold the rows that were read against those of the manifest, which older ones do not say."""
        if self.sound and self.file.rows and rows != self.file.rows:
            self._say(f"the manifest says {self.file.rows} rows, and it holds {rows}")

    def _foreign(self) -> list[str]:
        """What its metadata says of encoders and sizes that the folder's config says otherwise."""
        said = {key.decode(): value.decode() for key, value in (self.schema.metadata or {}).items()}
        facts = {name.removeprefix(_FACTS): value for name, value in said.items() if name.startswith(_FACTS)}
        return [
            f"it was made with {name} {value}, and the folder with {self.made_with[name]}"
            for name, value in facts.items()
            if name in self.made_with and str(self.made_with[name]) != value
        ]

    def _is_as_recorded(self) -> bool:
        """Fetch the file, and compare size and sum of its bytes."""
        try:
            self._stream = sources.open_seekable(self.address)
            digest = hashlib.sha256()
            while block := self._stream.read(_BLOCK):
                digest.update(block)
            size = self._stream.tell()
        except FileNotFoundError:
            self._say("it is missing")
            return False
        except OSError as error:
            self._say(f"it cannot be read: {error}")
            return False
        if size != self.file.size:
            self._say(f"it has {size} bytes, and the manifest says {self.file.size}")
            return False
        if digest.hexdigest() != self.file.sha256:
            self._say("it has changed: its sha256 is not the manifest's")
            return False
        return True

    def _say(self, problem: str) -> None:
        self.problems.append(f"{self.file.name}: {problem}")


def _plain(kind: pa.DataType) -> str:
    """A type without the name that its list gives its items, which is the writer's own."""
    return re.sub(r"<\w+: ", "<", str(kind))
