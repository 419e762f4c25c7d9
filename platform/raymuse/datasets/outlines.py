"""The four shapes as geometry: what they measure, and how much of each pixel they cover."""

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Outline:
    """What a shape of radius 1 measures: half its bounding box, its area, and its centroid below the box's centre."""

    half_width: float
    half_height: float
    area: float
    centroid_y: float


_HALF_SQUARE = 0.9
_HALF_BASE = 1.05  # of the equilateral triangle
_TRIANGLE_HALF_HEIGHT = _HALF_BASE * 3**0.5 / 2
_STAR_TIP = 1.05 / sin(2 * pi / 5)  # centre to tip: makes the star 1.05 wide to each side
_STAR_NOTCH = 0.45 * _STAR_TIP  # centre to notch; a touch fatter than the pentagram's 0.38, for small pictures
_STAR_BOX_Y = (1 - cos(pi / 5)) / 2 * _STAR_TIP  # the star's centre lies this far below its box's centre

OUTLINES = {
    "circle": Outline(1.0, 1.0, pi, 0.0),
    "square": Outline(_HALF_SQUARE, _HALF_SQUARE, 4 * _HALF_SQUARE**2, 0.0),
    "triangle": Outline(
        _HALF_BASE, _TRIANGLE_HALF_HEIGHT, 2 * _HALF_BASE * _TRIANGLE_HALF_HEIGHT, _TRIANGLE_HALF_HEIGHT / 3
    ),
    "star": Outline(1.05, _STAR_TIP - _STAR_BOX_Y, 5 * sin(pi / 5) * _STAR_TIP * _STAR_NOTCH, _STAR_BOX_Y),
}


def coverage(shape: str, x: float, y: float, radius: float, resolution: int) -> tuple[tuple[slice, slice], FloatArray]:
    """How much of each pixel a shape covers, in [0, 1], for the pixels (rows, columns) that it can touch.

    Drawn at `SUPERSAMPLING` times the resolution and averaged; parts outside the frame are cut off.
    """
    outline = OUTLINES[shape]
    rows, ys = _grid(y, outline.half_height * radius, resolution)
    columns, xs = _grid(x, outline.half_width * radius, resolution)
    distance = _signed_distance(shape, xs[None, :] / radius, ys[:, None] / radius) * radius
    inside = np.clip(0.5 - distance * (resolution * SUPERSAMPLING), 0, 1)
    boxes = inside.reshape(rows.stop - rows.start, SUPERSAMPLING, columns.stop - columns.start, SUPERSAMPLING)
    alpha: FloatArray = boxes.mean(axis=(1, 3), dtype=np.float32)
    return (rows, columns), alpha


def _grid(centre: float, reach: float, resolution: int) -> tuple[slice, FloatArray]:
    """The pixels within reach along one axis, and their sub-pixels' positions relative to the centre, in frames."""
    first = min(max(int((centre - reach) * resolution) - 1, 0), resolution)
    last = min(max(int((centre + reach) * resolution) + 2, first), resolution)
    fine = np.arange(first * SUPERSAMPLING, last * SUPERSAMPLING, dtype=np.float32)
    positions: FloatArray = (fine + np.float32(0.5)) / np.float32(resolution * SUPERSAMPLING) - np.float32(centre)
    return slice(first, last), positions


def _signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Distance in radii to the nearest edge line, negative inside; x is a row, y a column, the result a matrix."""
    x = np.abs(x)
    distance: FloatArray
    if shape == "circle":
        distance = np.sqrt(x * x + y * y) - np.float32(1)
    elif shape == "square":
        distance = np.maximum(x, np.abs(y)) - np.float32(_HALF_SQUARE)
    elif shape == "triangle":
        slanted = x * np.float32(3**0.5 / 2) - (y + np.float32(_TRIANGLE_HALF_HEIGHT)) * np.float32(0.5)
        distance = np.maximum(slanted, y - np.float32(_TRIANGLE_HALF_HEIGHT))
    else:
        assert shape == "star", shape
        distance = _star_distance(x, np.float32(_STAR_BOX_Y) - y)
    return distance


def _star_distance(x: FloatArray, y: FloatArray) -> FloatArray:
    """As `_signed_distance`, y up from the star's centre, x >= 0.

    The ten edges are mirror images: two reflections fold the plane onto the wedge of the top tip's right edge.
    """
    for angle in (-3 * pi / 5, -pi / 5):  # normals of the mirrors through the lower and the upper notch
        nx, ny = np.float32(cos(angle)), np.float32(sin(angle))
        beyond = np.maximum(x * nx + y * ny, np.float32(0))
        x, y = x - np.float32(2) * beyond * nx, y - np.float32(2) * beyond * ny
    along_x, along_y = _STAR_NOTCH * sin(pi / 5), _STAR_NOTCH * cos(pi / 5) - _STAR_TIP  # from tip to notch
    length = np.hypot(along_x, along_y)
    nx, ny = np.float32(-along_y / length), np.float32(along_x / length)
    distance: FloatArray = np.abs(x) * nx + (y - np.float32(_STAR_TIP)) * ny
    return distance
