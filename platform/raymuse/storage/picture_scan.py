"""The pictures of shards of any kind, by number, where they can only be read in order."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby

from raymuse.storage.images import Picture, Shard, read_shard
from raymuse.storage.rejects import Reject


class PictureScan:
    """Every readable picture of some shards, by number; for inputs that have no random access.

    Built by reading everything once, and keeps the keys. Whoever takes pictures reads their shards again. Picklable.

    Args:
        shards: what `list_shards` says, or some of it.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._shards = list(shards)
        self._keys: list[str] = []
        self._places: list[tuple[int, int]] = []  # number of the shard, and of the row in it
        self._refused: Counter[str] = Counter()
        for number, shard in enumerate(self._shards):
            for place, row in enumerate(read_shard(shard)):
                if isinstance(row, Reject):
                    self._refused[row.reason.value] += 1
                else:
                    self._keys.append(row.key)
                    self._places.append((number, place))

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, number: int) -> str:
        return self._keys[number]

    def take(self, numbers: Iterable[int]) -> Iterator[Picture]:
        """Some of the pictures, by ascending numbers. Raises OSError where a shard has changed."""
        for shard, wanted in groupby((self._places[number] for number in numbers), lambda place: place[0]):
            places = {place for _, place in wanted}
            last = max(places)
            for place, row in enumerate(read_shard(self._shards[shard])):
                if place in places:
                    if isinstance(row, Reject):
                        raise OSError(f"{self._shards[shard].address} has changed since it was first read")
                    yield row
                if place == last:
                    break

    def refused(self) -> dict[str, int]:
        """How many rows were refused, by reason."""
        return dict(self._refused)
