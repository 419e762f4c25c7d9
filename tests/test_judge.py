"""The judge of the shape pictures: it agrees with what was drawn, and rejects what was not."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter

from raymuse.config.errors import UserError
from raymuse.datasets.blobs import Picture
from raymuse.datasets.judge import Seen, compare, judge, nearest_render, see
from raymuse.datasets.sample import Sample
from raymuse.datasets.scenes import (
    BACKGROUNDS,
    COLOURS,
    HIDDEN_COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    parse,
)
from raymuse.datasets.shapes import Placed, render, samples

COUNT = 600  # pictures for each resolution and split, half of them with two things


@cache
def drawn(resolution: int, held_out: bool) -> list[Sample]:
    return list(samples(COUNT, seed=11, resolution=resolution, held_out=held_out))


@cache
def seen_of(resolution: int, held_out: bool) -> list[tuple[Seen, str]]:
    """What is in each picture drawn, and its caption."""
    return [(see(np.asarray(sample.image)), sample.caption) for sample in drawn(resolution, held_out)]


def round_trip(image: Image.Image, rng: np.random.Generator) -> Picture:
    """The slight blur and colour noise that a VQGAN leaves."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7)), float)
    return np.clip(blurred + rng.normal(0, 6, blurred.shape), 0, 255).astype(np.uint8)


def swapped(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """The scene with one attribute changed, for each kind of attribute that it has."""

    def other(word: str, words: Iterable[str]) -> str:
        return str(rng.choice([w for w in words if w != word]))

    k = int(rng.integers(len(scene.things)))
    thing = scene.things[k]
    taken = {t.colour for t in scene.things} | HIDDEN_COLOURS[scene.background]
    free = str(rng.choice([c for c in COLOURS if c not in taken]))
    plain = [b for b in BACKGROUNDS if not {t.colour for t in scene.things} & HIDDEN_COLOURS[b]]

    sizes = [t.size for t in scene.things]
    resized = sizes.index("large") if "large" in sizes else k  # two large things would be no scene

    def with_thing(at: int, **changes: str) -> Scene:
        things = list(scene.things)
        things[at] = replace(things[at], **changes)
        return replace(scene, things=tuple(things))

    scenes = {
        "size": with_thing(resized, size=other(sizes[resized], SIZES)),
        "colour": with_thing(k, colour=free),
        "shape": with_thing(k, shape=other(thing.shape, SHAPES)),
        "background": replace(scene, background=other(scene.background, plain)),
    }
    if scene.place is not None:
        scenes["place"] = replace(scene, place=other(scene.place, PLACES))
    if scene.relation is not None:
        scenes["relation"] = replace(scene, relation=other(scene.relation, RELATIONS))
        scenes["count"] = Scene((thing,), None, None, scene.background)
    else:
        second = Thing("small", free, "circle")
        scenes["count"] = Scene((thing, second), "above", None, scene.background)
    return scenes


both = pytest.mark.parametrize(("resolution", "held_out"), list(product((32, 64), (False, True))))


@both
def test_agrees_with_what_was_drawn(resolution: int, held_out: bool) -> None:
    verdicts = [compare(seen, words) for seen, words in seen_of(resolution, held_out)]
    assert np.mean([v.correct for v in verdicts]) >= 0.99


@both
def test_agrees_after_blur_and_noise(resolution: int, held_out: bool) -> None:
    rng = np.random.default_rng(0)
    verdicts = [judge(round_trip(s.image, rng), s.caption) for s in drawn(resolution, held_out)]
    assert np.mean([v.correct for v in verdicts]) >= 0.97


@both
def test_rejects_each_swapped_attribute_and_names_it(resolution: int, held_out: bool) -> None:
    rng = np.random.default_rng(1)
    rejected: dict[str, list[bool]] = {}
    named: dict[str, list[bool]] = {}
    for seen, words in seen_of(resolution, held_out):
        for kind, scene in swapped(parse(words), rng).items():
            verdict = compare(seen, caption(scene))
            rejected.setdefault(kind, []).append(not verdict.correct)
            named.setdefault(kind, []).append(not verdict.attributes[kind])
    assert set(rejected) == {"size", "colour", "shape", "background", "place", "relation", "count"}
    assert min(np.mean(values) for values in rejected.values()) >= 0.99
    assert min(np.mean(values) for values in named.values()) >= 0.99


def test_other_attributes_stay_right_when_one_is_swapped() -> None:
    rng = np.random.default_rng(2)
    spared = []
    for seen, words in seen_of(64, False):
        for kind, scene in swapped(parse(words), rng).items():
            if kind != "count":  # a missing thing has no attribute right
                attributes = compare(seen, caption(scene)).attributes
                spared += [right for name, right in attributes.items() if name != kind]
    assert np.mean(spared) >= 0.99


@pytest.mark.parametrize("resolution", [24, 48, 100, 256])
def test_works_at_other_resolutions(resolution: int) -> None:
    pictures = samples(100, 5, resolution, held_out=False)
    assert np.mean([judge(np.asarray(s.image), s.caption).correct for s in pictures]) >= 0.99


def test_every_combination_of_words_is_judged_right() -> None:
    for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, BACKGROUNDS):
        if colour not in HIDDEN_COLOURS[background]:
            scene = Scene((Thing(size, colour, shape),), None, None, background)
            radius = 0.139 if size == "small" else 0.21
            picture = np.asarray(render((Placed(scene.things[0], 0.45, 0.55, radius),), background, 32))
            assert judge(picture, caption(scene)).correct, caption(scene)


def test_names_only_what_the_caption_names() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    always = {"background", "count", "size", "colour", "shape"}
    assert set(judge(picture, "a large red circle on a white background").attributes) == always
    placed = judge(picture, "a large red circle at the top on a white background")
    assert set(placed.attributes) == always | {"place"}
    related = judge(picture, "a large red circle above a small blue star on a white background")
    assert set(related.attributes) == always | {"relation"}


def test_colours_swapped_between_the_things_are_wrong() -> None:
    first, second = Thing("large", "red", "circle"), Thing("small", "blue", "star")
    placed = (Placed(first, 0.3, 0.5, 0.24), Placed(second, 0.75, 0.5, 0.165))
    picture = np.asarray(render(placed, "white", 64))
    assert judge(picture, "a large red circle left of a small blue star on a white background").correct
    assert judge(picture, "a small blue star right of a large red circle on a white background").correct
    verdict = judge(picture, "a large blue circle left of a small red star on a white background")
    assert not verdict.attributes["colour"]
    assert verdict.attributes["shape"]
    assert verdict.attributes["relation"]


def test_garbage_is_wrong() -> None:
    rng = np.random.default_rng(3)
    captions = [s.caption for s in drawn(32, False)[:150]]
    for words in captions:
        background = BACKGROUNDS[parse(words).background]
        blank = np.full((32, 32, 3), background, np.uint8)
        specks = blank.copy()
        specks[::5, ::5] = 255 - np.array(background)
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(noise).resize((8, 8)).resize((32, 32), Image.Resampling.BICUBIC))
        for picture in (blank, specks, noise, soft):
            assert not judge(picture, words).correct


def test_a_third_thing_is_a_wrong_count() -> None:
    things = [Thing("small", colour, "circle") for colour in ("red", "blue", "green")]
    spots = [(0.25, 0.4), (0.75, 0.4), (0.5, 0.8)]
    placed = tuple(Placed(thing, x, y, 0.16) for thing, (x, y) in zip(things, spots, strict=True))
    words = "a small red circle left of a small blue circle on a black background"
    attributes = judge(np.asarray(render(placed, "black", 64)), words).attributes
    assert {name for name, right in attributes.items() if not right} == {"count"}


@pytest.mark.parametrize(("resolution", "most"), [(32, 0.2), (64, 0.05)])
def test_nearest_render_finds_the_drawing_again(resolution: int, most: float) -> None:
    """Errors are mean absolute differences of 255 levels."""
    rng = np.random.default_rng(4)
    for sample in drawn(resolution, False)[:300]:
        clean = np.asarray(sample.image, float)
        assert np.abs(nearest_render(np.asarray(sample.image), sample.caption) - clean).mean() < most
        noisy = nearest_render(round_trip(sample.image, rng), sample.caption)
        assert np.abs(noisy - clean).mean() < 2.5


def test_nearest_render_always_shows_the_caption() -> None:
    rng = np.random.default_rng(5)
    for sample in drawn(64, False)[:200]:
        for scene in swapped(parse(sample.caption), rng).values():
            clean = nearest_render(np.asarray(sample.image), caption(scene))
            assert clean.shape == (64, 64, 3)
            assert clean.dtype == np.uint8
            assert judge(clean, caption(scene)).correct, (sample.caption, caption(scene))


def test_refuses_what_is_no_picture_or_no_caption() -> None:
    words = "a large red circle on a white background"
    with pytest.raises(UserError, match="square RGB in uint8"):
        judge(np.zeros((32, 32, 3), np.float32), words)
    with pytest.raises(UserError, match="square RGB in uint8"):
        judge(np.zeros((32, 48, 3), np.uint8), words)
    with pytest.raises(UserError, match="not a caption"):
        judge(np.zeros((32, 32, 3), np.uint8), "a cat")
