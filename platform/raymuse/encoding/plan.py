"""What pre-tokenization will do, before it does it: which shard becomes which part, by which encoders, at what cost."""

import time
from typing import Any

import torch

from raymuse.config.errors import UserError
from raymuse.config.pretokenize import EncodingConfig, PretokenizeConfig, StreamConfig
from raymuse.encoding.chunks import decode_chunks, reading_of
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models.text import text_length
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import tokenizer_sha256, weights_sha256
from raymuse.storage.images import Shard, estimate_rows, list_shards
from raymuse.storage.tokens import parquet_bytes


def plan_of(config: EncodingConfig) -> dict[str, Shard]:
    """What becomes which part: a function of the input's names and the config alone."""
    shards = list_shards(config.inputs, images_per_shard=config.pictures_per_part, reading=reading_of(config))
    return {f"part-{number:06d}": shard for number, shard in enumerate(shards)}


def fingerprint(config: PretokenizeConfig | StreamConfig) -> dict[str, Any]:
    """What decides the ids and states beside the config: the encoders' weights and sizes.

    Raises:
        UserError: for encoders that cannot be read, or do not fit the crops.
    """
    vqgan = Vqgan.load(config.vqgan)
    low = Vqgan.load(config.low_vqgan) if config.low_vqgan else vqgan
    for shape in config.shapes:
        for name, sides, network in (("crop", shape, vqgan), ("low-resolution twin", config.low_shape(shape), low)):
            if sides is not None and any(side % network.factor for side in sides):
                raise UserError(
                    f"a {name} of {sides[0]} x {sides[1]} pixels is no multiple of the VQGAN's factor "
                    f"{network.factor}: change resolution, low_resolution or buckets."
                )
    return {
        "vqgan_sha256": weights_sha256(config.vqgan, "vqvae"),
        "low_vqgan_sha256": weights_sha256(config.low_vqgan, "vqvae") if config.low_vqgan else None,
        "text_encoder_sha256": weights_sha256(config.text_encoder, "text_encoder"),
        "codebook_size": vqgan.codes,
        "low_codebook_size": low.codes,
        "tokenizer_sha256": tokenizer_sha256(config.text_encoder),
        "text_length": text_length(config.text_encoder, config.text_length),
    }


def plan_text(config: PretokenizeConfig) -> str:
    """The plan as text (`--dry-run`): parts, rows, bytes; time and cost as one chunk, tried here, foretells them."""
    fingerprint(config)
    plan = plan_of(config)
    shards = list(plan.values())
    rows = estimate_rows(shards, reading_of(config))
    decode, encode, crops, size = _trial(config, shards[0])
    lines = [
        f"{len(plan)} parts, one a shard: {shards[0].name} ... {shards[-1].name}",
        f"{config.decoders} decoders, {config.encoders} encoders, chunks of {config.chunk_size}",
        f"tried here on {crops} crops of the first shard: decoding {crops / decode:,.1f} crops/s a decoder, "
        f"encoding {crops / encode:,.1f} crops/s an encoder; a crop with its captions takes {size:,.0f} bytes",
    ]
    if config.buckets:
        lines.append("buckets: training cannot read crops of several shapes yet")
    if rows is None:
        return "\n".join([*lines, "how many rows there are is not known before they are read"])
    total = rows * config.crops_per_picture * (2 if config.flip else 1)
    seconds = total * max(decode / config.decoders, encode / config.encoders) / crops
    cost = f", cost about {seconds / 3600 * config.price_per_hour:,.2f}" if config.price_per_hour else ""
    return "\n".join(
        [
            *lines,
            f"about {rows:,} pictures, {total:,} crops, {total * size / 2**30:,.2f} GiB",
            f"time about {_duration(seconds)} on machines like this one{cost}",
        ]
    )


def _trial(config: PretokenizeConfig, shard: Shard) -> tuple[float, float, int, float]:
    """Seconds to decode and to encode a chunk of a shard, its crops, and stored bytes a crop.

    The second chunk, since the first waits for the shard to be opened; on one thread, as an encoder of a CPU has.
    """
    if config.gpus_per_encoder > 0 and not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU to try an encoder on: run the plan where one is, or with gpus_per_encoder=0."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if config.gpus_per_encoder == 0 else threads)
    try:
        encoder = ChunkEncoder(config, config.device)
        began = time.perf_counter()
        for chunk in decode_chunks(shard, config):
            decoded = time.perf_counter() - began
            if chunk.number > 0 or chunk.last:
                break
            began = time.perf_counter()
        if not chunk.facts:
            raise UserError(f"{shard.name}: no picture of the first shard can be used: there is nothing to plan from.")
        encoder(chunk)  # the first call warms up
        began = time.perf_counter()
        encoded = encoder(chunk)
        seconds = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    stored = sum(len(parquet_bytes(getattr(encoded, table), {})) for table in ("tokens", "captions"))
    return decoded, seconds, len(chunk.facts), stored / len(chunk.facts)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
