"""How the stage has Ray Data work: small blocks, and patience."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext

from raymuse.config.pretokenize import PretokenizeConfig

RETRIES = 3
SMALLEST_BLOCK = 8 << 20  # bytes: of smaller blocks, what Ray Data does for each is what counts


@contextmanager
def stage_data(config: PretokenizeConfig) -> Iterator[None]:
    """Inside, data sets of this process hold a chunk a block, or a few small ones, and what fails is tried again.

    Ray Data's own blocks of 128 MiB are often a whole shard, for all of which an encoder would wait, and of which a
    decoder holds several. What waits between the steps takes at most half of the object store, by Ray Data's own bound.

    A store that fails once must not end a job of days. A retried decode repeats its chunks exactly, and Ray skips
    those that it had already.
    """
    context = DataContext.get_current().copy()
    context.target_max_block_size = max(_chunk_bytes(config) // 2, SMALLEST_BLOCK)  # a block ends where it holds more
    with patiently(context):
        yield


@contextmanager
def patiently(context: DataContext) -> Iterator[None]:
    """Inside, data sets of this process are as the context says, and what fails in them is tried again."""
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    context.actor_init_retry_on_errors, context.max_consecutive_actor_init_deaths = True, RETRIES
    with DataContext.current(context):
        yield


def _chunk_bytes(config: PretokenizeConfig) -> int:
    """Bytes of the pixels of a full chunk of the smallest shape."""
    return config.chunk_size * 3 * min(height * width for height, width in config.shapes)
