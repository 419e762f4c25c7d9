"""Does a picture show what its caption of shapes says? An exact judge by image analysis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from raymuse.config.errors import UserError
from raymuse.datasets.blobs import Blob, Fit, Picture, find_background, find_blobs
from raymuse.datasets.outlines import OUTLINES, FloatArray
from raymuse.datasets.scenes import BACKGROUNDS, COLOURS, RGB, Scene, Thing, parse
from raymuse.datasets.shapes import GAP, RADII, Placed, arrange, render

SAME_COLOUR = 80.0  # RGB distance within which a colour counts as the palette's nearest one
SAME_SHAPE = 0.7  # overlap over union below which a blob has no shape; at 32 px a blurred, noisy star still has 0.76
LEAST_OFFSET = 0.08  # from the frame's centre, in frames, for a thing "at the left"; drawn ones have 0.16
# Where small ends and large begins: halfway, in ratio, between the drawn ranges; the outer ends are generous.
SIZE_BORDERS = {"small": (0.12, 0.200), "large": (0.200, 0.36)}


@dataclass(frozen=True)
class Verdict:
    """Right or wrong for each attribute that the caption names.

    Always background, count, size, colour and shape; place or relation where the caption has one. An attribute of two
    things is right when it is right for both.
    """

    attributes: Mapping[str, bool]

    @property
    def correct(self) -> bool:
        return all(self.attributes.values())


@dataclass(frozen=True)
class Seen:
    """What is in a picture, whatever its caption says.

    Attributes:
        background: the border's colour (3,).
        plain: whether the border has one colour.
        blobs: the largest things, largest first.
        count: how many things there are.
    """

    background: FloatArray
    plain: bool
    blobs: Sequence[Blob]
    count: int


def judge(picture: Picture, caption: str) -> Verdict:
    """Compare a picture with its caption.

    Args:
        picture: uint8 (H, W, 3), square, side 24 px or more.
        caption: as `scenes.caption` writes it.

    Raises:
        UserError: not a caption of shapes, or not such a picture.
    """
    return compare(see(picture), caption)


def see(picture: Picture) -> Seen:
    """Analyse a picture, once for any number of captions. Raises UserError as `judge`."""
    _check_picture(picture)
    background, plain = find_background(picture)
    return Seen(background, plain, *find_blobs(picture, background))


def compare(seen: Seen, caption: str) -> Verdict:
    """`judge` of a picture that was seen already."""
    scene = parse(caption)
    attributes = {
        "background": seen.plain and _named_colour(seen.background, BACKGROUNDS) == scene.background,
        "count": seen.count == len(scene.things),
    }
    return Verdict(attributes | _judge_things(scene, _assign(scene, seen.blobs)))


def _check_picture(picture: Picture) -> None:
    shape = picture.shape
    if picture.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or shape[0] != shape[1] or shape[0] < 24:
        raise UserError(
            f"cannot judge a picture of {picture.dtype} {shape}: it must be square RGB in uint8, 24 px or more"
        )


def _assign(scene: Scene, blobs: Sequence[Blob]) -> list[Blob | None]:
    """The blob of each thing: of all assignments the one that gets most attributes right, None where blobs lack."""
    padded: list[Blob | None] = [*blobs, *[None] * (len(scene.things) - len(blobs))]
    choices = [list(choice) for choice in permutations(padded, len(scene.things))]
    return max(choices, key=lambda choice: _count_right(scene, choice))


def _count_right(scene: Scene, blobs: Sequence[Blob | None]) -> int:
    right = [_judge_thing(thing, blob) for thing, blob in zip(scene.things, blobs, strict=True)]
    return sum(sum(attributes.values()) for attributes in right) + _is_arranged(scene, blobs)


def _judge_things(scene: Scene, blobs: Sequence[Blob | None]) -> dict[str, bool]:
    each = [_judge_thing(thing, blob) for thing, blob in zip(scene.things, blobs, strict=True)]
    attributes = {name: all(one[name] for one in each) for name in each[0]}
    if scene.place is not None:
        attributes["place"] = _is_arranged(scene, blobs)
    if scene.relation is not None:
        attributes["relation"] = _is_arranged(scene, blobs)
    return attributes


def _judge_thing(thing: Thing, blob: Blob | None) -> dict[str, bool]:
    if blob is None:
        return {"size": False, "colour": False, "shape": False}
    best = blob.best_shape
    fit = blob.fits[best]
    low, high = SIZE_BORDERS[thing.size]
    return {
        "size": low <= fit.radius < high,
        "colour": _named_colour(blob.colour, COLOURS) == thing.colour,
        "shape": best == thing.shape and fit.agreement >= SAME_SHAPE,
    }


def _named_colour(colour: FloatArray, palette: Mapping[str, RGB]) -> str | None:
    """The palette's nearest colour, or None where none is near."""
    distances = np.linalg.norm(np.array(list(palette.values())) - colour, axis=1)
    nearest = int(distances.argmin())
    return list(palette)[nearest] if distances[nearest] <= SAME_COLOUR else None


def _is_arranged(scene: Scene, blobs: Sequence[Blob | None]) -> bool:
    """Whether the blobs' centres are as the caption's place or relation says; True where it says nothing."""
    fits = [None if blob is None else blob.fits[blob.best_shape] for blob in blobs]
    return _fits_arranged(scene, [fit for fit in fits if fit is not None])


def _fits_arranged(scene: Scene, fits: Sequence[Fit]) -> bool:
    if len(fits) < len(scene.things):
        return False
    if scene.place is not None:
        return _direction(fits[0].x - 0.5, fits[0].y - 0.5, LEAST_OFFSET) == scene.place
    if scene.relation is not None:
        towards = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
        direction = _direction(fits[0].x - fits[1].x, fits[0].y - fits[1].y, 0.0)
        return direction is not None and towards[direction] == scene.relation
    return True


def _direction(x: float, y: float, least: float) -> str | None:
    """Which way (x, y) mainly points, y down; None where it is no longer than `least`."""
    if max(abs(x), abs(y)) <= least:
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def nearest_render(picture: Picture, caption: str) -> Picture:
    """The clean picture of the caption whose things lie and measure most like the picture's.

    Shapes, colours and background are the caption's; centres and radii are fitted to the picture, radii within the
    caption's sizes. Where the picture lacks a thing, contradicts the caption's place or relation, or leaves no room
    for the things, no such fit exists, and they stand where `shapes.arrange` puts them for a fixed seed.

    Args:
        picture: uint8 (H, W, 3), square, side 24 px or more.
        caption: as `scenes.caption` writes it.

    Returns:
        uint8, the picture's shape.

    Raises:
        UserError: as `judge`.
    """
    _check_picture(picture)
    scene = parse(caption)
    blobs, _ = find_blobs(picture, find_background(picture)[0])
    chosen = _assign(scene, blobs)
    fits = [blob.fits[t.shape] for t, blob in zip(scene.things, chosen, strict=True) if blob is not None]
    placed = _place(scene, fits) if _fits_arranged(scene, fits) else None
    if placed is None:
        placed = arrange(scene, np.random.default_rng(0))
    return np.asarray(render(placed, scene.background, picture.shape[0]))


def _place(scene: Scene, fits: Sequence[Fit]) -> tuple[Placed, ...] | None:
    """The things where they were found; None where they would run together even at their sizes' smallest radii.

    A drawn pair is apart, but the caption may name wider shapes or a larger size than the picture shows.
    """
    smallest = [RADII[thing.size][0] for thing in scene.things]
    fitted = [float(np.clip(f.radius, *RADII[t.size])) for t, f in zip(scene.things, fits, strict=True)]
    for radii in (fitted, smallest):
        placed = tuple(_place_one(*each) for each in zip(scene.things, fits, radii, strict=True))
        if len(placed) == 1 or _are_apart(*placed):
            return placed
    return None


def _place_one(thing: Thing, fit: Fit, radius: float) -> Placed:
    outline = OUTLINES[thing.shape]
    x, y = _keep_inside(fit.x, outline.half_width * radius), _keep_inside(fit.y, outline.half_height * radius)
    return Placed(thing, x, y, radius)


def _keep_inside(centre: float, reach: float) -> float:
    return min(max(centre, reach), 1 - reach)


def _are_apart(first: Placed, second: Placed) -> bool:
    """Whether at least half the drawn gap lies between the bounding boxes."""
    a, b = OUTLINES[first.thing.shape], OUTLINES[second.thing.shape]
    across = abs(first.x - second.x) - first.radius * a.half_width - second.radius * b.half_width
    down = abs(first.y - second.y) - first.radius * a.half_height - second.radius * b.half_height
    return max(across, down) >= GAP / 2
