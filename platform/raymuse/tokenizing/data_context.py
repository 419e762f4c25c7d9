"""How the stage has Ray Data work: small blocks, and patience."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext, ExecutionResources

from raymuse.config.pretokenize import PretokenizeConfig

RETRIES = 3
CHUNKS_AHEAD = 4  # of pixels, between a decoder and an encoder, for each of them


@contextmanager
def stage_data(config: PretokenizeConfig) -> Iterator[None]:
    """Inside, data sets of this process hold a chunk a block, a few chunks ahead, and what fails is tried again.

    Ray Data's own blocks of 128 MiB are often a whole shard, for all of which an encoder would wait; and its own
    bound is half the object store, which a decoder would fill however slow the encoders are. So the memory for what
    is under way follows from the config, and from neither the input nor the machine.

    A store that fails once must not end a job of days. A retried decode repeats its chunks exactly, and Ray skips
    those that it had already.
    """
    least, most = _chunk_bytes(config)
    context = DataContext.get_current().copy()
    context.target_max_block_size = least // 2  # a block ends where it holds more
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=CHUNKS_AHEAD * (config.decoders + config.encoders) * most
    )
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    context.actor_init_retry_on_errors, context.max_consecutive_actor_init_deaths = True, RETRIES
    with DataContext.current(context):
        yield


def _chunk_bytes(config: PretokenizeConfig) -> tuple[int, int]:
    """Bytes of the pixels of a full chunk: of the smallest shape, and of the largest."""
    sizes = [config.chunk_size * 3 * height * width for height, width in config.shapes]
    return min(sizes), max(sizes)
