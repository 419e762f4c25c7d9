"""Blobs of colour in a picture: where they are, and which shape fits each of them best. No learned model.

A picture is taken as a plain background with a few plain blobs. The background is the median of the frame's outermost
pixels; a pixel whose RGB distance from it exceeds `VISIBLE` is foreground; touching foreground pixels are one blob;
blobs below `SPECK` of the picture's area are ignored.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from raymuse.datasets.outlines import OUTLINES, FloatArray, coverage

Picture = npt.NDArray[np.uint8]

VISIBLE = 50.0  # RGB distance; the nearest colour and background, green on black, are 143 apart
SPECK = 0.01  # of the picture's area; the smallest star has 0.03
PLAIN_BORDER = 0.7  # share of the outermost pixels that must have the background's colour
MOST_BLOBS = 4  # only the largest are fitted: time stays bounded on noise, and more is wrong anyway


@dataclass(frozen=True)
class Fit:
    """The circle, square, triangle or star of a blob's area and centroid, in unit coordinates.

    `agreement` is the overlap of the two coverages over their union (soft IoU), in [0, 1].
    """

    x: float
    y: float
    radius: float
    agreement: float


@dataclass(frozen=True)
class Blob:
    """One blob: its inner colour (3,), and its coverage of the pixels (H, W) in [0, 1], zero away from it."""

    colour: FloatArray
    alpha: FloatArray

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """How well each shape matches the blob."""
        height, width = self.alpha.shape
        area = float(self.alpha.sum())
        y = float(self.alpha.sum(axis=1) @ (np.arange(height) + 0.5)) / area / height
        x = float(self.alpha.sum(axis=0) @ (np.arange(width) + 0.5)) / area / width
        return {shape: self._fit(shape, x, y, area / (height * width)) for shape in OUTLINES}

    def _fit(self, shape: str, x: float, y: float, area: float) -> Fit:
        outline = OUTLINES[shape]
        radius = (area / outline.area) ** 0.5
        y -= outline.centroid_y * radius
        window, covered = coverage(shape, x, y, radius, self.alpha.shape[0])
        overlap = float(np.minimum(covered, self.alpha[window]).sum())
        union = float(covered.sum() + self.alpha.sum()) - overlap
        return Fit(x, y, radius, overlap / union)

    @property
    def best_shape(self) -> str:
        return max(self.fits, key=lambda shape: self.fits[shape].agreement)


def find_background(picture: Picture) -> tuple[FloatArray, bool]:
    """The colour (3,) of the picture's border, and whether the border is plain."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]]).astype(np.float32)
    colour: FloatArray = np.median(border, axis=0).astype(np.float32)
    alike = np.linalg.norm(border - colour, axis=1) < VISIBLE
    return colour, bool(alike.mean() >= PLAIN_BORDER)


def find_blobs(picture: Picture, background: FloatArray) -> tuple[list[Blob], int]:
    """The largest blobs of a picture (H, W, 3), at most `MOST_BLOBS`, largest first, and how many there are in all."""
    contrast = picture.astype(np.float32) - background
    distance: FloatArray = np.sqrt(np.einsum("hwc,hwc->hw", contrast, contrast))
    labels, _ = ndimage.label(distance > VISIBLE)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    large = [int(label) for label in np.argsort(-areas) if areas[label] >= SPECK * labels.size]
    return [_cut_out(contrast, distance, labels, label, background) for label in large[:MOST_BLOBS]], len(large)


def _cut_out(
    contrast: FloatArray,
    distance: FloatArray,
    labels: npt.NDArray[np.int32],
    label: int,
    background: FloatArray,
) -> Blob:
    """The blob of one label.

    A pixel's coverage is its place on the line from the background to the blob's own colour. The rim just outside the
    label counts too: that is where a blur has carried the rest of the edge.
    """
    mask = labels == label
    inner = contrast[mask & (distance >= np.median(distance[mask]))]
    colour = np.median(inner, axis=0)
    near = ndimage.binary_dilation(mask, np.ones((3, 3), bool)) & (mask | (labels == 0))
    alpha = np.where(near, np.clip(contrast @ colour / (colour @ colour), 0, 1), 0)
    return Blob((background + colour).astype(np.float32), alpha.astype(np.float32))
