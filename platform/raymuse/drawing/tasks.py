"""What each task starts from: which ids are known, which are drawn, and on what course.

    text-to-image      nothing is known
    image-to-image     the picture's ids, some of them masked at random; sampling enters at a later step
    inpaint            the ids outside the mask
    outpaint           inpainting of a larger canvas
    mask-free          all of the picture's ids, of which a few at a time are drawn again (Muse, section 4.5)
    super-resolution   the base's ids are those of the picture

A cascade does the same twice: with the base's ids, then, given these, with the high-res ids.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from raymuse.config.edit import ROUNDS, SHARE
from raymuse.config.errors import UserError
from raymuse.config.sampling import SamplingConfig
from raymuse.drawing.inputs import Mask
from raymuse.drawing.sampler import Course, Draws
from raymuse.masking import START, uniforms

Ids = NDArray[np.int64]

UNKNOWN = -1
"""In place of an id that is to be drawn; what stands for it in the network is the model's own mask id."""

TOP_K = 3  # of mask-free editing: Muse, section 4.5


@dataclass(frozen=True)
class Stage:
    """One network's part of a picture: the ids (h, w) it starts from, and its steps."""

    ids: Ids
    course: Course
    draws: Draws = field(default_factory=Draws)


@dataclass(frozen=True)
class Request:
    """One picture to draw.

    Attributes:
        high: of a cascade's super-resolution; None without one.
        paste: pixels and mask: what lies outside the mask is the picture's own again after drawing.

    Raises:
        UserError: for a seed that is not in [0, 2^63).
    """

    prompt: str
    negative: str
    seed: int
    base: Stage
    high: Stage | None = None
    paste: tuple[NDArray[np.uint8], Mask] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed}: seeds are whole numbers from 0 to 2^63 - 1")

    @property
    def shape(self) -> tuple[object, ...]:
        """What requests of one batch must share."""
        stages = [self.base, *([] if self.high is None else [self.high])]
        return tuple((stage.ids.shape, stage.draws) for stage in stages)


def from_nothing(grid: tuple[int, int], sampling: SamplingConfig) -> Stage:
    """All ids are drawn."""
    return from_known(np.full(grid, UNKNOWN), sampling)


def from_known(ids: Ids, sampling: SamplingConfig) -> Stage:
    """The ids that are `UNKNOWN` are drawn, in as many steps, on their own count's schedule."""
    masked = int((ids == UNKNOWN).sum())
    return Stage(ids, Course.of(sampling, ids.size, masked), Draws.of(sampling))


def kept(ids: Ids) -> Stage:
    """Nothing is drawn."""
    return Stage(ids, Course([], [], []))


def from_picture(ids: Ids, sampling: SamplingConfig, strength: float, seed: int) -> Stage:
    """Image-to-image: the last `strength` of the steps, from ids masked at random as they would be by then.

    Raises:
        UserError: for a strength outside [0, 1]. At 1 nothing of the picture is left, at 0 nothing is drawn.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength:g} is outside [0, 1]: 0 keeps the picture, 1 ignores it")
    steps = max(1, round(strength * sampling.steps)) if strength > 0 else 0
    first = sampling.steps - steps
    if first == 0:
        return from_nothing(ids.shape, sampling)
    if steps == 0:
        return kept(ids)
    course = Course.of(sampling, ids.size, first=first)
    masked = Course.of(sampling, ids.size, first=first - 1).remaining[0]
    order = uniforms(seed, START, [0], ids.size)[0].argsort().argsort()
    return Stage(np.where(order.reshape(ids.shape) < masked, UNKNOWN, ids), course, Draws.of(sampling))


def resampled(ids: Ids, sampling: SamplingConfig, seed: int, rounds: int = ROUNDS, share: float = SHARE) -> Stage:
    """Mask-free editing: in every round a random share of the ids is drawn again, all at once (Muse, section 4.5).

    Raises:
        UserError: for a share outside (0, 1], or no round.
    """
    if not 0 < share <= 1 or rounds < 1:
        raise UserError(f"{rounds} rounds with a share of {share:g}: give at least one round, and a share in (0, 1]")
    ranks = uniforms(seed, START, range(rounds), ids.size).argsort(axis=1).argsort(axis=1)
    hide = ranks < max(1, round(share * ids.size))
    course = Course([0] * rounds, [0.0] * rounds, [sampling.guidance] * rounds, hide)
    return Stage(ids, course, replace(Draws.of(sampling), order="confidence"))


def touched(mask: Mask, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which cells of a grid (h, w) a mask (H, W) touches: none of its pixels survives in a known cell."""
    height, width = grid
    cells = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    return np.asarray(cells.any(axis=(1, 3)))
