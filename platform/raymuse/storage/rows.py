"""What every input format speaks: how to read, the shards of a plan, and the rows that they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raymuse.storage.rejects import Reason, printable
from raymuse.storage.tar_scan import Span

Kind = Literal["tar", "folder", "parquet", "arrow", "hub"]


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Args:
        image_column: of Parquet and Hugging Face data sets; None: found by its usual names.
        caption_column: of those and of caption tables, and field of the .json. Where it is said, captions come from
            it alone; None: found.
        caption_prefix: put before every caption as it is, so end it with a space.
        repair_captions: captions that are not UTF-8 have their odd bytes read as Latin-1; else they are refused.
        split: of a Hugging Face data set.
    """

    image_column: str | None = None
    caption_column: str | None = None
    caption_prefix: str = ""
    repair_captions: bool = False
    split: str = "train"


AS_IS = Reading()


@dataclass(frozen=True, slots=True)
class Member:
    """One picture of a folder; its names are relative to the folder.

    Args:
        picture: its file; its key is that name without the ending.
        text: its .txt, where there is one.
        metadata: its .json, where there is one.
        captions: what a table, or else the file name, says.
        fields: the other columns of the table.
        refused: why it cannot be used, where the listing shows that already; `detail` says more.
    """

    picture: str
    text: str | None = None
    metadata: str | None = None
    captions: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    refused: Reason | None = None
    detail: str = ""

    @property
    def key(self) -> str:
        return printable(self.picture.rpartition(".")[0])


@dataclass(frozen=True, slots=True)
class Blocks:
    """A run of the blocks of a file (row groups of Parquet, record batches of Arrow): from `start` to before `stop`.

    Args:
        first_row: number in the file of the run's first row.
        rows: how many rows the run has.
    """

    start: int
    stop: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Shard:
    """A unit of work. Small and picklable.

    Args:
        name: unique in its list; stands as `source` in rejects. The same wherever the data lies.
        address: the file, the folder, or the data set.
        kind: of the input; each is one module that lists and reads it.
        members: folder: its pictures.
        blocks: parquet, arrow: its part of the file; None: the whole, where the listing could not look into it.
        piece: hub: its number, and how many there are.
    """

    name: str
    address: str
    kind: Kind
    members: tuple[Member, ...] = ()
    blocks: Blocks | None = None
    piece: tuple[int, int] | None = None


@dataclass(frozen=True)
class Picture:
    """A captioned picture, not decoded.

    Args:
        key: unique in its shard; a label, never a path.
        data: the bytes of the file.
        captions: at least one; none is empty.
        metadata: what the .json or the table says besides (width, height, original_width, aesthetic, ...).
        notes: what was mended on the way, each once: captions_cleaned, captions_repaired.
    """

    key: str
    data: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture whose bytes are not read yet: they are the span of the file at `address`."""

    key: str
    captions: tuple[str, ...]
    metadata: dict[str, Any]
    address: str
    span: Span
    notes: tuple[str, ...] = ()

    def picture(self, data: bytes) -> Picture:
        """With its bytes."""
        return Picture(self.key, data, self.captions, self.metadata, self.notes)


def cut_blocks(rows: Sequence[int], rows_per_shard: int) -> list[Blocks]:
    """Runs of whole blocks with at most `rows_per_shard` rows; a larger block is a run of its own.

    Args:
        rows: how many rows each block has; no run is cut before a block without rows.
    """
    runs: list[Blocks] = []
    start = first_row = count = 0
    for number, block in enumerate(rows):
        if count and block and count + block > rows_per_shard:
            runs.append(Blocks(start, number, first_row, count))
            start, first_row, count = number, first_row + count, 0
        count += block
    return [*runs, Blocks(start, len(rows), first_row, count)] if count else runs


def block_shards(name: str, address: str, kind: Kind, runs: Sequence[Blocks]) -> list[Shard]:
    """The shards of one file, named after their rows where there are several."""
    if len(runs) == 1:
        return [Shard(name, address, kind, blocks=runs[0])]
    return [Shard(f"{name}:{run.first_row}-{run.first_row + run.rows - 1}", address, kind, blocks=run) for run in runs]
