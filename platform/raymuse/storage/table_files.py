"""The files of a table (Parquet, Arrow) as shards: runs of their blocks, which are never cut."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raymuse.config.errors import UserError
from raymuse.storage import sources
from raymuse.storage.rows import Kind, Shard, block_shards, cut_blocks

LISTING_THREADS = 16  # what tells the blocks of a file is a few small requests


class Unopened(Exception):  # noqa: N818 - a verdict on the file
    """A file is not there, not ours to read (on a disk), or of no such format."""


@dataclass(frozen=True)
class TableFiles:
    """Files of one table.

    Args:
        where: what was asked for, for messages.
        folder: what the names are relative to.
        names: in their order.
    """

    where: str
    folder: str
    names: Sequence[str]

    def shards(self, kind: Kind, count: Callable[[str], list[int] | None], rows_per_shard: int) -> list[Shard]:
        """The shards of all files. A file that cannot be opened is one too, which is refused when it is read.

        Args:
            count: of the file at an address the rows of each block; None where that is not known, and the file is one
                shard. Raises Unopened.
            rows_per_shard: at most; a larger block is a shard of its own.

        Raises:
            UserError: no file can be opened, or none has a row; and what `count` raises.
        """

        def look(name: str) -> list[int] | Unopened | None:
            try:
                return count(sources.join(self.folder, name))
            except Unopened as error:
                return error

        with ThreadPoolExecutor(LISTING_THREADS) as threads:
            found = list(threads.map(look, self.names))
        problems = [one for one in found if isinstance(one, Unopened)]
        if problems and len(problems) == len(found):
            title = kind.capitalize()
            raise UserError(f"{self.where}: no {title} file can be read; {self.names[0]}: {problems[0]}")
        shards: list[Shard] = []
        for name, rows in zip(self.names, found, strict=True):
            address = sources.join(self.folder, name)
            if isinstance(rows, list):
                shards += block_shards(name, address, kind, cut_blocks(rows, rows_per_shard))
            else:
                shards.append(Shard(name, address, kind))
        if not shards:
            raise UserError(f"{self.where}: the {len(found)} {kind.capitalize()} file(s) have no rows.")
        return shards
