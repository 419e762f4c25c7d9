"""A training's crops encoded while it runs, on Ray Data: decode (CPU) -> encode (actors) -> split among the workers.

Chunks pass in the order of the training's positions, so that each worker gets its rows of every chunk as they come.
A chunk becomes one block a worker; Ray Data's split hands blocks round, and a block says whose it is.
"""

import pickle
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, DataIterator, ExecutionResources, TaskPoolStrategy

from raymuse.clusters.placement import encoding_task, place
from raymuse.clusters.quiet import quiet_data
from raymuse.config.pretokenize import StreamConfig
from raymuse.config.training import MaskedConfig
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.encoding.survey import Found, look_through
from raymuse.encoding.tasks import DECODE_CPUS
from raymuse.storage.images import Shard
from raymuse.tokenizing.data_context import RETRIES, patiently
from raymuse.training.crops import CropPlan
from raymuse.training.engine import rank_and_world
from raymuse.training.saving import agreed
from raymuse.training.streamed import Piece, Pieces, piece_of
from raymuse.training.surveying import Surveyor, encode_empty

AHEAD = 4  # pieces that a worker fetches before it needs them


def feed(config: MaskedConfig) -> Pieces:
    """The pieces of a Ray Train worker. Worker 0 starts the execution, which ends with it."""
    plan = CropPlan.of(config)

    def pieces(first: int, stop: int) -> Iterator[Piece]:
        rank, world = rank_and_world()
        splits = agreed(_splits(config, plan, plan.chunks(first, stop), world) if rank == 0 else None)
        return _pieces(splits[rank], rank)

    return pieces


def _pieces(split: DataIterator, rank: int) -> Iterator[Piece]:
    for batch in split.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=AHEAD):
        for owner, data in zip(batch["rank"].to_pylist(), batch["piece"].to_pylist(), strict=True):
            if owner != rank:
                raise RuntimeError(f"Ray Data handed worker {rank} what is worker {owner}'s")
            piece = pickle.loads(data)
            assert isinstance(piece, Piece)
            yield piece


def _splits(config: MaskedConfig, plan: CropPlan, chunks: range, world: int) -> list[DataIterator]:
    """An iterator a worker over its pieces of some chunks."""
    stream = plan.stream
    quiet_data()
    with _feeding(config, world):
        pieces = (
            ray.data.from_items([{"number": number} for number in chunks], override_num_blocks=len(chunks))
            .map_batches(
                _decode,
                batch_size=1,
                compute=TaskPoolStrategy(size=stream.decoders),
                num_cpus=DECODE_CPUS,
                label_selector=place("decode", gpus=0),
                fn_kwargs={"plan": plan},
            )
            .map_batches(
                _EncodePieces,
                batch_size=1,
                compute=ActorPoolStrategy(min_size=stream.min_encoders or stream.encoders, max_size=stream.encoders),
                num_gpus=stream.gpus_per_encoder or None,
                label_selector=place("encode", stream.gpus_per_encoder),
                fn_constructor_kwargs={"plan": plan, "world": world},
            )
        )
        return list(pieces.streaming_split(world))


@contextmanager
def _feeding(config: MaskedConfig, world: int) -> Iterator[None]:
    """Inside, data sets keep their order and hold one row a block, leave the workers their room, and try again."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1  # bytes: each row that is yielded is a block of its own
    context.execution_options.preserve_order = True
    gpus = float(world) if config.use_gpu else 0.0
    context.execution_options.exclude_resources = ExecutionResources(cpu=config.cpus_per_worker * world, gpu=gpus)
    with patiently(context):
        yield


def _decode(batch: dict[str, Any], plan: CropPlan) -> dict[str, Any]:
    """A number to its chunk."""
    return {"chunk": [pickle.dumps(_kept(plan).chunk(int(batch["number"][0])))]}


@lru_cache(maxsize=2)
def _kept(plan: CropPlan) -> CropPlan:
    """An equal plan, which has read its survey where this process made a chunk of it before."""
    return plan


class _EncodePieces:
    """A chunk to the pieces of all workers, in their order, one a row."""

    def __init__(self, plan: CropPlan, world: int) -> None:
        self.plan, self.world = plan, world
        self.encoder = ChunkEncoder(plan.stream, plan.stream.device)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chunk = pickle.loads(batch["chunk"][0])
        encoded = self.encoder(chunk)
        for rank in range(self.world):
            yield {
                "rank": [rank],
                "piece": [pickle.dumps(piece_of(self.plan, chunk.number, encoded, rank, self.world))],
            }


# --- the survey


def surveyor(config: MaskedConfig) -> Surveyor:
    """A survey on the cluster: a task a shard where decoding is done, and the empty caption where encoding is.

    It warns where the cluster has no room now for the workers and the encoders together.
    """
    stream = config.stream
    assert stream is not None
    there = ray.cluster_resources()
    cpus = config.cpus_per_worker * config.workers + DECODE_CPUS
    cpus += (stream.min_encoders or stream.encoders) if stream.gpus_per_encoder == 0 else 0
    gpus = config.workers * config.use_gpu + (stream.min_encoders or stream.encoders) * stream.gpus_per_encoder
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > there.get(name, 0.0):
            print(
                f"warning: workers and encoders ask for {needed:g} {name}s and the cluster has now "
                f"{there.get(name, 0.0):g}: the work waits for more machines, or lower workers or stream.encoders.",
                file=sys.stderr,
            )
    return Surveyor(_look, _empty)


def _look(address: str, stream: StreamConfig, shards: Sequence[Shard]) -> list[Found]:
    task = ray.remote(num_cpus=DECODE_CPUS, max_retries=RETRIES, retry_exceptions=[OSError])(look_through)
    placed = task.options(label_selector=place("decode", gpus=0))
    return list(ray.get([placed.remote(address, stream, number, shard) for number, shard in enumerate(shards)]))


def _empty(stream: StreamConfig) -> pa.Table:
    return ray.get(encoding_task(encode_empty, stream.gpus_per_encoder).remote(stream))
