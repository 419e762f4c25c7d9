"""The frozen encoders as one batch callable: chunks of crops and captions to the tables of a token shard.

N crops, K captions, T text tokens. Every network call has one fixed shape (padded), so that what comes out does not
depend on how many rows a chunk happens to hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.chunks import Chunk, CropFacts
from raymuse.encoding.pictures import downscale
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan
from raymuse.storage.rejects import to_table
from raymuse.storage.tokens import caption_id, captions_schema, fixed, tokens_schema

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Encoded:
    """The tables of one chunk: crops, captions, refused rows."""

    tokens: pa.Table
    captions: pa.Table
    rejects: pa.Table


class ChunkEncoder:
    """Holds the VQGAN(s) and the text encoder; picklable by its config."""

    def __init__(self, config: PretokenizeConfig, device: str = "cpu") -> None:
        self.config = config
        dtype = DTYPES[config.precision]
        self.vqgan = Vqgan.load(config.vqgan, device, dtype)
        self.low_vqgan = Vqgan.load(config.low_vqgan, device, dtype) if config.low_vqgan else self.vqgan
        self.text = TextEncoder.load(config.text_encoder, device)

    def __call__(self, chunk: Chunk) -> Encoded:
        grid, low_grid = self.grids()
        schema = tokens_schema(grid, low_grid)
        tokens = self._tokens(chunk, schema) if chunk.facts else schema.empty_table()
        names = dict.fromkeys(caption for facts in chunk.facts for caption in facts.captions)
        return Encoded(tokens, self.captions(list(names)), to_table(chunk.rejects))

    def grids(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """(height, width) of the ids, and of the low-res ids where the config asks for them."""
        side = self.config.resolution // self.vqgan.factor
        if self.config.low_resolution is None:
            return (side, side), None
        low = self.config.low_resolution // self.low_vqgan.factor
        return (side, side), (low, low)

    def captions(self, captions: Sequence[str]) -> pa.Table:
        """The captions table: text ids, and what the encoder says of them where the config asks for states."""
        states = self.config.text == "states"
        schema = captions_schema(
            self.text.length, self.text.width if states else None, self.text.pooled_width if states else None
        )
        if not captions:
            return schema.empty_table()
        text_ids, mask = self.text.tokenize(captions)
        columns = [
            pa.array([caption_id(caption) for caption in captions]),
            pa.array(list(captions)),
            fixed(text_ids.numpy().astype(np.int32), pa.int32()),
            fixed(mask.numpy(), pa.bool_()),
        ]
        if states:
            said, pooled = self._said(text_ids)
            columns += [fixed(said, pa.float16()), fixed(pooled, pa.float16())]
        return pa.Table.from_arrays(columns, schema=schema)

    def _tokens(self, chunk: Chunk, schema: pa.Schema) -> pa.Table:
        pixels = np.stack(chunk.pixels)
        columns: dict[str, Any] = {"image_ids": self._ids(self.vqgan.encode, pixels)}
        if (low := self.config.low_resolution) is not None:
            small = np.stack([downscale(picture, low) for picture in pixels])
            columns["low_ids"] = self._ids(self.low_vqgan.encode, small)
        arrays = []
        for field in schema:
            ids = "low_ids" if field.name.startswith("low_") else "image_ids"
            if field.name in columns:
                arrays.append(fixed(columns[field.name].astype(np.uint16), pa.uint16()))
            elif field.name.removeprefix("low_") in ("height", "width"):
                side = columns[ids].shape[1 if field.name.endswith("height") else 2]
                arrays.append(pa.array([side] * len(pixels), type=field.type))
            else:
                arrays.append(pa.array([_value(facts, field.name) for facts in chunk.facts], type=field.type))
        return pa.Table.from_arrays(arrays, schema=schema)

    def _ids(self, encode: Callable[[NDArray[np.uint8]], NDArray[np.int64]], pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Ids (N, h, w) of pictures (N, H, W, 3), encoded at the one batch shape."""
        return encode(_padded(pixels, self.config.chunk_size))[: len(pixels)]

    def _said(self, text_ids: torch.Tensor) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """States (K, T, E) and pooled vectors (K, P), encoded in batches of one shape."""
        size, states, pooled = self.config.chunk_size, [], []
        for start in range(0, len(text_ids), size):
            piece = text_ids[start : start + size]
            said, summary = self.text.encode(torch.from_numpy(_padded(piece.numpy(), size)))
            states.append(said[: len(piece)].cpu().numpy().astype(np.float16))
            pooled.append(summary[: len(piece)].cpu().numpy().astype(np.float16))
        return np.concatenate(states), np.concatenate(pooled)


def _value(facts: CropFacts, name: str) -> Any:
    return [caption_id(caption) for caption in facts.captions] if name == "caption_ids" else getattr(facts, name)


def _padded(rows: NDArray[Any], size: int) -> NDArray[Any]:
    """Rows (N, ...) with zeros up to `size` rows."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), dtype=rows.dtype)])
