"""What a captioned picture of shapes may show, said in words: scenes, their captions, and the held-out split.

Captions read like these: "a large red circle on a white background", "a small blue star at the left on a black
background", "a small red star left of a large blue circle on a yellow background".
"""

import re
from dataclasses import dataclass

import numpy as np

from raymuse.config.errors import UserError

RGB = tuple[int, int, int]

SIZES = ("small", "large")
SIZES_OF_TWO = (("small", "small"), ("small", "large"), ("large", "small"))  # two large things do not fit
SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, RGB] = {
    "red": (210, 20, 40),
    "green": (25, 150, 60),
    "blue": (35, 70, 225),
    "yellow": (250, 220, 20),
    "cyan": (40, 205, 225),
    "pink": (255, 105, 180),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "yellow": (250, 220, 20),
}
# An object must not hide in its background.
HIDDEN_COLOURS: dict[str, frozenset[str]] = {
    "white": frozenset(),
    "black": frozenset(),
    "yellow": frozenset({"yellow"}),
}
PLACES = ("left", "right", "top", "bottom")
RELATIONS = ("left of", "right of", "above", "below")
PLACED_SHARE = 1 / 3  # of the one-object scenes


@dataclass(frozen=True)
class Thing:
    """One object.

    Raises:
        UserError: a word that is not in the vocabulary.
    """

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        _check_word("size", self.size, SIZES)
        _check_word("colour", self.colour, tuple(COLOURS))
        _check_word("shape", self.shape, SHAPES)


@dataclass(frozen=True)
class Scene:
    """One thing, perhaps with a place, or two of different colours, one small at least, with a relation.

    All on a plain background.

    Raises:
        UserError: the scene cannot be drawn, or would not be clear.
    """

    things: tuple[Thing, ...]
    relation: str | None
    place: str | None
    background: str

    def __post_init__(self) -> None:
        _check_word("background", self.background, tuple(BACKGROUNDS))
        if self.place is not None:
            _check_word("place", self.place, PLACES)
        if self.relation is not None:
            _check_word("relation", self.relation, RELATIONS)
        if len(self.things) == 1:
            if self.relation is not None:
                raise UserError("a scene with one thing has no relation: give it a place or nothing")
        elif len(self.things) == 2:
            self._check_pair()
        else:
            raise UserError(f"a scene has one or two things, not {len(self.things)}")
        for thing in self.things:
            if thing.colour in HIDDEN_COLOURS[self.background]:
                raise UserError(f"a {thing.colour} thing cannot be seen on a {self.background} background")

    def _check_pair(self) -> None:
        if self.relation is None or self.place is not None:
            raise UserError("a scene with two things has a relation and no place")
        if self.things[0].colour == self.things[1].colour:
            raise UserError(f"the two things of a scene differ in colour: both are {self.things[0].colour}")
        if self.things[0].size == self.things[1].size == "large":
            raise UserError("two large things do not fit into one picture: one of a scene's two is small")


def _check_word(kind: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise UserError(f"unknown {kind} {word!r}: use one of {', '.join(words)}")


def caption(scene: Scene) -> str:
    """The scene in words; `parse` is its exact inverse."""
    words = _describe(scene.things[0])
    if scene.place is not None:
        words += f" at the {scene.place}"
    if scene.relation is not None:
        words += f" {scene.relation} {_describe(scene.things[1])}"
    return f"{words} on a {scene.background} background"


def _describe(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


_CAPTION = re.compile(
    r"a (\w+) (\w+) (\w+)"
    rf"(?: at the (?P<place>\w+)| (?P<relation>{'|'.join(RELATIONS)}) a (\w+) (\w+) (\w+))?"
    r" on a (?P<background>\w+) background"
)


def parse(caption: str) -> Scene:
    """The scene that a caption names.

    Raises:
        UserError: the caption is not one that `caption` writes.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise UserError(
            f"not a caption of shapes: {caption!r}; write for example "
            "'a small red star left of a large blue circle on a white background'"
        )
    size, colour, shape, place, relation, *second, background = match.groups()
    things = [Thing(size, colour, shape)]
    if relation is not None:
        things.append(Thing(*second))
    return Scene(tuple(things), relation, place, background)


def is_held_out(scene: Scene) -> bool:
    """Whether any thing's (size, colour, shape) is one of the 8 in 48 that training never shows.

    Each colour loses one or two of its 8 combinations, each shape two of 12, each size four of 24, so that every word
    is learnt and only the combination is new.
    """
    return any(_is_held_out_triple(thing) for thing in scene.things)


def _is_held_out_triple(thing: Thing) -> bool:
    size, colour, shape = SIZES.index(thing.size), list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return (colour + 2 * shape + 5 * size) % len(COLOURS) == 0


def sample_scene(rng: np.random.Generator, objects: int, held_out: bool) -> Scene:
    """A random scene of the training or the held-out split.

    Raises:
        UserError: `objects` is neither 1 nor 2.
    """
    if objects not in (1, 2):
        raise UserError(f"a scene has one or two things, not {objects}")
    while True:  # about 6 tries for one held-out thing, 3 for two, and 1 for training
        scene = _any_scene(rng, objects)
        if is_held_out(scene) == held_out:
            return scene


def _any_scene(rng: np.random.Generator, objects: int) -> Scene:
    background = _pick(rng, tuple(BACKGROUNDS))
    visible = [colour for colour in COLOURS if colour not in HIDDEN_COLOURS[background]]
    order = rng.permutation(len(visible))[:objects]
    sizes = [_pick(rng, SIZES)] if objects == 1 else SIZES_OF_TWO[int(rng.integers(len(SIZES_OF_TWO)))]
    things = tuple(Thing(size, visible[i], _pick(rng, SHAPES)) for size, i in zip(sizes, order, strict=True))
    relation = _pick(rng, RELATIONS) if objects == 2 else None
    place = _pick(rng, PLACES) if objects == 1 and rng.random() < PLACED_SHARE else None
    return Scene(things, relation, place, background)


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]
