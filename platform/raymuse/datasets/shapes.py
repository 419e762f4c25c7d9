"""Captioned pictures of shapes that the project draws: a data set with an exact judge (`raymuse.datasets.judge`).

Unit coordinates: the frame is [0, 1] x [0, 1], x to the right, y down. A thing's place is the centre of its bounding
box, and its radius is in frames; `outlines.OUTLINES` says how many radii each shape reaches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from raymuse.datasets.outlines import OUTLINES, coverage
from raymuse.datasets.sample import Sample, check_request, sample_generator, sample_key
from raymuse.datasets.scenes import BACKGROUNDS, COLOURS, Scene, Thing, caption, sample_scene

MARGIN = 0.02  # between a thing and the frame
GAP = 0.08  # between two things: 2.5 px at 32 px, so that a blur does not join them
PLACE_OFFSET = 0.16  # how far off the centre a thing "at the left" is, at least
SWAY = 0.06  # how far it strays across, and one without a place from the centre, at most
RELATION_SLOPE = 0.6  # across over along, at most, between two things

# The smallest large thing has 1.8 times the area of the largest small one; a small circle is 10 px wide at 32 px.
RADII = {"small": (0.160, 0.172), "large": (0.235, 0.265)}
LARGEST_IN_PAIR = 0.245  # a small and a large star, the gap and the margins just fit


@dataclass(frozen=True)
class Placed:
    """A thing with its exact centre and radius, in unit coordinates."""

    thing: Thing
    x: float
    y: float
    radius: float


def draw(scene: Scene, resolution: int, rng: np.random.Generator) -> Image.Image:
    """A square RGB picture of the scene, with the place and scale of each thing drawn from `rng`."""
    return render(arrange(scene, rng), scene.background, resolution)


def arrange(scene: Scene, rng: np.random.Generator) -> tuple[Placed, ...]:
    """Places for the scene's things: inside the frame, apart, and as the scene's words say."""
    if len(scene.things) == 1:
        return (_arrange_one(scene.things[0], scene.place, rng),)
    assert scene.relation is not None
    return _arrange_two(scene.things[0], scene.things[1], scene.relation, rng)


def _arrange_one(thing: Thing, place: str | None, rng: np.random.Generator) -> Placed:
    radius = rng.uniform(*RADII[thing.size])
    centre = 0.5 + rng.uniform(-SWAY, SWAY, 2)
    if place is not None:
        along = 0 if place in ("left", "right") else 1
        farthest = 0.5 - MARGIN - float(_reach(thing.shape, radius)[along])
        offset = rng.uniform(PLACE_OFFSET, farthest)
        centre[along] = 0.5 - offset if place in ("left", "top") else 0.5 + offset
    return Placed(thing, float(centre[0]), float(centre[1]), radius)


def _arrange_two(first: Thing, second: Thing, relation: str, rng: np.random.Generator) -> tuple[Placed, ...]:
    along, across = (0, 1) if relation in ("left of", "right of") else (1, 0)
    things = (first, second) if relation in ("left of", "above") else (second, first)
    radii = [rng.uniform(RADII[t.size][0], min(RADII[t.size][1], LARGEST_IN_PAIR)) for t in things]
    reach = np.stack([_reach(t.shape, r) for t, r in zip(things, radii, strict=True)])
    low, high = MARGIN + reach, 1 - MARGIN - reach

    room = 1 - 2 * MARGIN - GAP - 2 * reach[:, along].sum()
    start, stop = np.sort(rng.uniform(0, room, 2))
    centres = np.empty((2, 2))
    centres[0, along] = low[0, along] + start
    centres[1, along] = high[1, along] - (room - stop)
    sway = RELATION_SLOPE * (centres[1, along] - centres[0, along])
    centres[0, across] = rng.uniform(low[0, across], high[0, across])
    centres[1, across] = rng.uniform(
        max(low[1, across], centres[0, across] - sway), min(high[1, across], centres[0, across] + sway)
    )
    placed = [Placed(t, float(c[0]), float(c[1]), r) for t, c, r in zip(things, centres, radii, strict=True)]
    return tuple(placed if things[0] is first else placed[::-1])


def _reach(shape: str, radius: float) -> npt.NDArray[np.float64]:
    """Half the bounding box, (x, y)."""
    outline = OUTLINES[shape]
    return radius * np.array([outline.half_width, outline.half_height])


def render(placed: tuple[Placed, ...], background: str, resolution: int) -> Image.Image:
    """The square RGB picture of things at exact places, anti-aliased; the same places give the same pixels."""
    canvas = np.full((resolution, resolution, 3), BACKGROUNDS[background], np.float32)
    for item in placed:
        window, alpha = coverage(item.thing.shape, item.x, item.y, item.radius, resolution)
        patch = canvas[window]
        patch += alpha[..., None] * (np.array(COLOURS[item.thing.colour], np.float32) - patch)
    return Image.fromarray((canvas + 0.5).astype(np.uint8))


def samples(
    count: int, seed: int, resolution: int, held_out: bool, two_objects: float = 0.5, start: int = 0
) -> Iterator[Sample]:
    """Pictures number `start` to `start + count - 1` of an endless, seeded series.

    Picture i depends on (seed, i) alone, so that shards can be drawn in any order on any worker.

    Args:
        count: how many.
        seed: of the series, 0 or more.
        resolution: side in pixels, 24 or more.
        held_out: the split: scenes with a (size, colour, shape) that training never shows, or without any.
        two_objects: share of scenes with two things, in [0, 1].
        start: number of the first picture.

    Raises:
        UserError: a count or resolution that makes no sense.
    """
    check_request(count, start, resolution)
    for index in range(start, start + count):
        rng = sample_generator(seed, index)
        scene = sample_scene(rng, 2 if rng.random() < two_objects else 1, held_out)
        yield Sample(sample_key(index), draw(scene, resolution, rng), caption(scene))
