"""Random access to the pictures of shards, without unpacking them: for training the VQGAN and CLIP."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from raymuse.storage import sources
from raymuse.storage.images import Entry, Picture, Shard, read_entries
from raymuse.storage.rejects import Reject


class PictureIndex:
    """Every readable picture of some shards, by number.

    Built in one pass over the headers and captions; a picture costs one open, seek and read. Picklable, and holds no
    open file, so that worker processes and threads may share it. Keeps the numbers of a picture's metadata (sizes,
    aesthetic score) and not its texts. Remote addresses work, at one request a picture.

    Args:
        shards: what `list_shards` says, or some of it: tars and folders.

    Attributes:
        rejects: rows that the shards hold but that cannot be used.

    Raises:
        UserError: for other kinds of input, whose pictures are no spans of a file.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.rejects: list[Reject] = []
        self._entries: list[Entry] = []
        for shard in shards:
            for row in read_entries(shard):
                if isinstance(row, Entry):
                    self._entries.append(_slim(row))
                else:
                    self.rejects.append(row)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: int) -> Picture:
        """The picture, its bytes read now. Raises IndexError, OSError."""
        entry = self._entries[number]
        data = sources.read_span(entry.address, entry.span.offset, entry.span.size)
        if len(data) != entry.span.size:
            raise OSError(f"{entry.address} has changed since it was indexed: {entry.key} is no longer whole")
        return replace(entry, metadata=dict(entry.metadata)).picture(data)

    def take(self, numbers: Iterable[int]) -> Iterator[Picture]:
        """Some of the pictures, in the order of the numbers."""
        return (self[number] for number in numbers)

    def key(self, number: int) -> str:
        return self._entries[number].key

    def captions(self, number: int) -> tuple[str, ...]:
        """The captions of a picture, without reading it."""
        return self._entries[number].captions

    def refused(self) -> dict[str, int]:
        """How many rows were refused, by reason."""
        return dict(Counter(reject.reason.value for reject in self.rejects))


def _slim(entry: Entry) -> Entry:
    numbers: dict[str, Any] = {
        name: value for name, value in entry.metadata.items() if isinstance(value, (bool, int, float))
    }
    return replace(entry, metadata=numbers)
