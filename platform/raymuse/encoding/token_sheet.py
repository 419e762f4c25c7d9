"""Rows of token shards as pictures again, beside their captions."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from raymuse.models.vqgan import Vqgan
from raymuse.storage.contact_sheet import Entry
from raymuse.storage.token_survey import TokenRow

_BATCH = 8  # crops decoded at a time


def token_entries(vqgan: Vqgan, rows: Sequence[TokenRow], low: bool) -> tuple[list[Entry], list[str]]:
    """What the ids of some rows decode to, and which ids those are.

    Args:
        low: whether the low-res ids are this VQGAN's as well, and shown where there are some.
    """
    kinds = ["image_ids", *(["low_ids"] if rows[0].low_ids is not None and low else [])]
    decoded = [_decoded(vqgan, [getattr(row, kind) for row in rows]) for kind in kinds]
    entries = [
        Entry(f"{' | '.join(row.captions)} [{row.key}]", tuple(_square(pixels) for pixels in pictures))
        for row, pictures in zip(rows, zip(*decoded, strict=True), strict=True)
    ]
    return entries, kinds


def _decoded(vqgan: Vqgan, ids: Sequence[NDArray[np.uint16]]) -> list[NDArray[np.uint8]]:
    """Pictures (H, W, 3) of ids (h, w), whose grids may differ."""
    pictures: dict[int, NDArray[np.uint8]] = {}
    order = sorted(range(len(ids)), key=lambda row: ids[row].shape)
    for _, group in groupby(order, key=lambda row: ids[row].shape):
        rows = list(group)
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            pixels = vqgan.decode(np.stack([ids[row] for row in some]).astype(np.int64))
            pictures.update(zip(some, pixels, strict=True))
    return [pictures[row] for row in range(len(ids))]


def _square(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in the middle of a white square: the sheet's cells are square."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas
