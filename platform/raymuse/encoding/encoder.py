"""The frozen encoders as one batch callable: chunks of crops and captions to the tables of a token shard.

N crops of H W pixels, K captions, T text tokens. Every network call has one fixed shape a kind of crop (padded), so
that what comes out does not depend on how many rows a chunk happens to hold.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raymuse.config.errors import UserError
from raymuse.config.pretokenize import EncodingConfig
from raymuse.encoding.chunks import Chunk, CropFacts, Shape
from raymuse.encoding.pictures import downscale
from raymuse.models.precision import Precision, float32_products
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.storage.rejects import Reason, Reject, to_table
from raymuse.storage.tokens import caption_id, captions_schema, fixed, tokens_schema

MOST_CODES = 1 << 16  # ids are stored as uint16


@dataclass(frozen=True)
class Encoded:
    """The tables of one chunk: crops, captions, refused rows; and what was counted.

    Args:
        counts: the chunk's, without the pictures that the encoders refused.
        truncated: ids of the captions that have more tokens than fit.
    """

    tokens: pa.Table
    captions: pa.Table
    rejects: pa.Table
    counts: dict[str, int]
    truncated: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Codes:
    """Ids of N crops and of their low-resolution twins, where there are any.

    Args:
        image_ids: (N, h, w).
        low_ids: (N, h', w').
        finite: (N,); the ids of the others mean nothing.
    """

    image_ids: NDArray[np.int64]
    low_ids: NDArray[np.int64] | None
    finite: NDArray[np.bool_]


@dataclass(frozen=True)
class CropEncoder:
    """The VQGAN of the crops and that of their low-resolution twins; often the same."""

    config: EncodingConfig
    vqgan: Vqgan
    low_vqgan: Vqgan

    @classmethod
    def load(cls, config: EncodingConfig, device: str, precision: Precision) -> "CropEncoder":
        """Raises UserError where they cannot be read, or have more codes than a stored id can say."""
        vqgan = Vqgan.load(config.vqgan, device, precision)
        low = Vqgan.load(config.low_vqgan, device, precision) if config.low_vqgan else vqgan
        if (codes := max(vqgan.codes, low.codes)) > MOST_CODES:
            raise UserError(f"a codebook of {codes} does not fit token shards: an id is stored in 16 bits.")
        return cls(config, vqgan, low)

    def grids(self, shape: Shape) -> tuple[Shape, Shape | None]:
        """(height, width) of the ids of a crop of (H, W) pixels, and of its low-res ids where the config asks."""
        low = self.config.low_shape(shape)
        return _over(shape, self.vqgan.factor), None if low is None else _over(low, self.low_vqgan.factor)

    def __call__(self, shape: Shape, crops: Sequence[NDArray[np.uint8]]) -> Codes:
        """Crops, each uint8 (H, W, 3), to ids; encoded at the one batch shape."""
        rows, size = len(crops), self.config.chunk_size
        ids, finite = self.vqgan.encode_checked(_padded(np.stack(crops), size))
        if (low := self.config.low_shape(shape)) is None:
            return Codes(ids[:rows], None, finite[:rows])
        twins = np.stack([downscale(crop, low) for crop in crops])
        low_ids, low_finite = self.low_vqgan.encode_checked(_padded(twins, size))
        return Codes(ids[:rows], low_ids[:rows], (finite & low_finite)[:rows])


class CaptionEncoder:
    """Holds the text encoder. It counts in bf16 where the config's `precision` says so and in fp32 else.

    Args:
        device: of PyTorch.
    """

    def __init__(self, config: EncodingConfig, device: str = "cpu") -> None:
        self.config = config
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.text = TextEncoder.load(config.text_encoder, device, dtype, length=config.text_length)

    def __call__(self, captions: Sequence[str]) -> pa.Table:
        """The captions table: text ids, and what the encoder says of them where the config asks for states.

        Raises:
            UserError: the encoder says of one what is not finite, or what float16 cannot hold.
        """
        table, sound, _ = self.encode(captions)
        if not sound.all():
            raise UserError(
                f"{self.config.text_encoder}: the states of the caption {captions[int(sound.argmin())]!r} are not "
                "finite, or beyond what float16 holds (65504). Set text: ids, which stores none, or take another."
            )
        return table

    def encode(self, captions: Sequence[str]) -> tuple[pa.Table, NDArray[np.bool_], frozenset[str]]:
        """The captions table, which rows (K,) can be stored, and the ids of the captions that were truncated."""
        states = self.config.text == "states"
        schema = captions_schema(
            self.text.length, self.text.width if states else None, self.text.pooled_width if states else None
        )
        if not captions:
            return schema.empty_table(), np.ones(0, dtype=np.bool_), frozenset()
        text_ids, mask = self.text.tokenize(captions)
        columns = [
            pa.array([caption_id(caption) for caption in captions]),
            pa.array(list(captions)),
            fixed(text_ids.numpy().astype(np.int32), pa.int32()),
            fixed(mask.numpy(), pa.bool_()),
        ]
        sound = np.ones(len(captions), dtype=np.bool_)
        if states:
            said, pooled, sound = self._said(text_ids)
            columns += [fixed(said, pa.float16()), fixed(pooled, pa.float16())]
        full = [caption for caption, real in zip(captions, mask.all(dim=1).tolist(), strict=True) if real]
        truncated = frozenset(caption_id(caption) for caption in self.text.truncated(full))
        return pa.Table.from_arrays(columns, schema=schema), sound, truncated

    def _said(self, text_ids: torch.Tensor) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.bool_]]:
        """States (K, T, E), pooled vectors (K, P), and which rows (K,) are finite; encoded in batches of one shape."""
        size, pieces = self.config.chunk_size, []
        for start in range(0, len(text_ids), size):
            piece = text_ids[start : start + size]
            with float32_products("ieee"):
                said = self.text.encode(torch.from_numpy(_padded(piece.numpy(), size)))
            states, pooled = (tensor[: len(piece)].half() for tensor in said)
            finite = states.isfinite().flatten(1).all(dim=1) & pooled.isfinite().all(dim=1)
            pieces.append([tensor.cpu().numpy() for tensor in (states, pooled, finite)])
        states_KTE, pooled_KP, finite_K = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return states_KTE, pooled_KP, finite_K


class ChunkEncoder:
    """Holds the VQGAN(s) and the text encoder.

    Args:
        config: `precision` says how the VQGANs count: fp32, tf32 (on CUDA; fp32 elsewhere) or bf16. The nearest code
            is always sought in fp32.
        device: of PyTorch.
    """

    def __init__(self, config: EncodingConfig, device: str = "cpu") -> None:
        self.config = config
        self.crops = CropEncoder.load(config, device, config.precision)
        self.captions = CaptionEncoder(config, device)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode a chunk. A picture of which an encoder says nothing finite becomes a reject, with all its crops.

        Such a reject is taken off the count `pictures`, so that pictures and rejects still add up to the input.
        """
        counts = Counter(chunk.counts)
        schema = tokens_schema(*self.crops.grids(chunk.shape))
        if not chunk.facts:
            return Encoded(schema.empty_table(), self.captions([]), to_table(chunk.rejects), dict(counts))
        codes = self.crops(chunk.shape, chunk.pixels)
        names = list(dict.fromkeys(caption for facts in chunk.facts for caption in facts.captions))
        captions, sound, truncated = self.captions.encode(names)
        wrong = {name for name, finite in zip(names, sound, strict=True) if not finite}
        refused = _refused(chunk, codes.finite, wrong)
        rows = [row for row, facts in enumerate(chunk.facts) if facts.key not in refused]
        if refused:
            used = {caption for row in rows for caption in chunk.facts[row].captions}
            captions = captions.filter(pa.array([name in used for name in names]))
        counts.subtract({"pictures": len(refused)} if refused else {})
        tokens = _tokens([chunk.facts[row] for row in rows], codes, rows, schema)
        kept = truncated.intersection(captions["caption_id"].to_pylist())
        return Encoded(tokens, captions, to_table([*chunk.rejects, *refused.values()]), dict(counts), kept)


def code_agreement(config: EncodingConfig, chunk: Chunk, device: str = "cpu") -> float:
    """Share of a chunk's ids, low-res ones included, that the config's precision and fp32 agree on; 0 to 1."""
    if not chunk.pixels:
        raise ValueError("a chunk without crops says nothing of the precision")
    precisions: tuple[Precision, Precision] = (config.precision, "fp32")
    ours, exact = (CropEncoder.load(config, device, kind)(chunk.shape, chunk.pixels) for kind in precisions)
    same = []
    for mine, theirs in ((ours.image_ids, exact.image_ids), (ours.low_ids, exact.low_ids)):
        if mine is not None and theirs is not None:
            same.append((mine == theirs).flatten())
    return float(np.concatenate(same).mean())


def _refused(chunk: Chunk, finite: NDArray[np.bool_], wrong: set[str]) -> dict[str, Reject]:
    """By key, the pictures that an encoder says nothing finite of: by their latents, or by a caption's states."""
    refused: dict[str, Reject] = {}
    for facts, sound in zip(chunk.facts, finite, strict=True):
        detail = None
        if not sound:
            detail = f"the VQGAN's latents of crop {facts.crop} are not finite"
        elif wrong.intersection(facts.captions):
            detail = "the text encoder's states of a caption are not finite, or beyond what float16 holds"
        if detail is not None:
            refused.setdefault(facts.key, Reject(facts.source, facts.key, Reason.NOT_FINITE, detail))
    return refused


def _tokens(facts: Sequence[CropFacts], codes: Codes, rows: Sequence[int], schema: pa.Schema) -> pa.Table:
    """The tokens table of the `rows` of `codes` that are kept, with their facts."""
    if not rows:
        return schema.empty_table()
    ids = {"image_ids": codes.image_ids[rows]}
    if codes.low_ids is not None:
        ids["low_ids"] = codes.low_ids[rows]
    arrays = []
    for field in schema:
        if field.name in ids:
            arrays.append(fixed(ids[field.name].astype(np.uint16), pa.uint16()))
        elif field.name.removeprefix("low_") in ("height", "width"):
            grid = ids["low_ids" if field.name.startswith("low_") else "image_ids"]
            side = grid.shape[1 if field.name.endswith("height") else 2]
            arrays.append(pa.array([side] * len(rows), type=field.type))
        else:
            arrays.append(pa.array([_value(one, field.name) for one in facts], type=field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _value(facts: CropFacts, name: str) -> Any:
    return [caption_id(caption) for caption in facts.captions] if name == "caption_ids" else getattr(facts, name)


def _over(shape: Shape, factor: int) -> Shape:
    return shape[0] // factor, shape[1] // factor


def _padded(rows: NDArray[Any], size: int) -> NDArray[Any]:
    """Rows (N, ...) with zeros up to `size` rows."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), dtype=rows.dtype)])
