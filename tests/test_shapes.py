"""The pictures of shapes: captions and their parser, the held-out split, drawing, and the numbered series."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from math import sqrt

import numpy as np
import pytest

from raymuse.config.errors import UserError
from raymuse.datasets.outlines import OUTLINES, coverage
from raymuse.datasets.scenes import (
    BACKGROUNDS,
    COLOURS,
    HIDDEN_COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    SIZES_OF_TWO,
    Scene,
    Thing,
    caption,
    is_held_out,
    parse,
    sample_scene,
)
from raymuse.datasets.shapes import MARGIN, RADII, Placed, arrange, draw, render, samples

RED_CIRCLE = Thing("large", "red", "circle")
BLUE_STAR = Thing("small", "blue", "star")


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, 1 + i % 2, bool(i % 4 // 2)) for i in range(count)]


class TestCaptions:
    def test_reads_as_documented(self) -> None:
        one = Scene((RED_CIRCLE,), None, None, "white")
        assert caption(one) == "a large red circle on a white background"
        assert caption(replace(one, place="left")) == "a large red circle at the left on a white background"
        two = Scene((BLUE_STAR, RED_CIRCLE), "left of", None, "yellow")
        assert caption(two) == "a small blue star left of a large red circle on a yellow background"

    def test_parse_is_the_exact_inverse(self) -> None:
        scenes = some_scenes(2000)
        assert [parse(caption(scene)) for scene in scenes] == scenes

    @pytest.mark.parametrize(
        "words",
        [
            "",
            "grinning face on a yellow background",
            "a large red circle",
            "a huge red circle on a white background",
            "a large teal circle on a white background",
            "a large red hexagon on a white background",
            "a large red circle at the middle on a white background",
            "a large red circle on a teal background",
            "a large yellow circle on a yellow background",
            "a large orange circle on a white background",
            "a large red circle above a small red star on a white background",
            "a large red circle beside a small blue star on a white background",
            "a large red circle at the left above a small blue star on a white background",
            " a large red circle on a white background",
            "A large red circle on a white background",
            "a large red circle on a white background\n",
        ],
    )
    def test_parse_refuses_anything_else(self, words: str) -> None:
        with pytest.raises(UserError):
            parse(words)

    def test_impossible_scenes_are_refused(self) -> None:
        with pytest.raises(UserError, match="one or two things, not 3"):
            Scene((RED_CIRCLE, BLUE_STAR, RED_CIRCLE), "above", None, "white")
        with pytest.raises(UserError, match="no relation"):
            Scene((RED_CIRCLE,), "above", None, "white")
        with pytest.raises(UserError, match="two large things do not fit"):
            Scene((RED_CIRCLE, replace(BLUE_STAR, size="large")), "above", None, "white")
        with pytest.raises(UserError, match="a relation and no place"):
            Scene((RED_CIRCLE, BLUE_STAR), "above", "left", "white")


class TestPalette:
    def test_colours_are_apart_from_each_other_and_from_backgrounds(self) -> None:
        for (a, first), (b, second) in combinations(COLOURS.items(), 2):
            assert np.linalg.norm(np.subtract(first, second)) > 95, (a, b)
        for colour, background in product(COLOURS, BACKGROUNDS):
            if colour not in HIDDEN_COLOURS[background]:
                contrast = np.linalg.norm(np.subtract(COLOURS[colour], BACKGROUNDS[background]))
                assert contrast > 110, (colour, background)


class TestHeldOut:
    def test_is_one_in_six_and_every_word_stays_in_training(self) -> None:
        triples = [Thing(*words) for words in product(SIZES, COLOURS, SHAPES)]
        held_out = [t for t in triples if is_held_out(Scene((t,), None, None, "white"))]
        assert (len(held_out), len(triples)) == (8, 48)
        assert set(Counter(t.colour for t in held_out).values()) == {1, 2}
        assert Counter(t.shape for t in held_out) == dict.fromkeys(SHAPES, 2)
        assert Counter(t.size for t in held_out) == dict.fromkeys(SIZES, 4)

    @pytest.mark.parametrize("objects", [1, 2])
    @pytest.mark.parametrize("held_out", [False, True])
    def test_sampled_scenes_keep_to_their_split(self, objects: int, held_out: bool) -> None:
        rng = np.random.default_rng(1)
        scenes = [sample_scene(rng, objects, held_out) for _ in range(500)]
        assert {is_held_out(s) for s in scenes} == {held_out}
        assert {len(s.things) for s in scenes} == {objects}
        assert {t.colour for s in scenes for t in s.things} == set(COLOURS)
        assert {s.background for s in scenes} == set(BACKGROUNDS)

    def test_a_third_of_the_single_things_have_a_place(self) -> None:
        rng = np.random.default_rng(2)
        placed = sum(sample_scene(rng, 1, False).place is not None for _ in range(3000))
        assert abs(placed - 1000) < 4 * sqrt(3000 * 2 / 9)

    def test_three_things_are_refused(self) -> None:
        with pytest.raises(UserError, match="not 3"):
            sample_scene(np.random.default_rng(0), 3, False)


def box(item: Placed) -> tuple[float, float, float, float]:
    outline = OUTLINES[item.thing.shape]
    w, h = outline.half_width * item.radius, outline.half_height * item.radius
    return item.x - w, item.y - h, item.x + w, item.y + h


class TestArranging:
    def test_things_are_inside_the_frame_and_of_their_size(self) -> None:
        rng = np.random.default_rng(3)
        for scene in some_scenes(2000, seed=3):
            for item in arrange(scene, rng):
                assert min(box(item)) >= MARGIN - 1e-9
                assert max(box(item)) <= 1 - MARGIN + 1e-9
                low, high = RADII[item.thing.size]
                assert low <= item.radius <= high

    def test_large_has_1_8_times_the_area_of_small_and_small_is_10_px_wide_at_32(self) -> None:
        assert (RADII["large"][0] / RADII["small"][1]) ** 2 > 1.8
        assert 2 * RADII["small"][0] * 32 > 10

    @pytest.mark.parametrize("relation", RELATIONS)
    def test_a_relation_holds_with_a_clear_gap(self, relation: str) -> None:
        rng = np.random.default_rng(4)
        for shapes in product(SHAPES, SHAPES):
            for sizes in SIZES_OF_TWO:
                first, second = Thing(sizes[0], "red", shapes[0]), Thing(sizes[1], "blue", shapes[1])
                for _ in range(5):
                    a, b = arrange(Scene((first, second), relation, None, "white"), rng)
                    assert (a.thing, b.thing) == (first, second)
                    gaps = {
                        "left of": box(b)[0] - box(a)[2],
                        "right of": box(a)[0] - box(b)[2],
                        "above": box(b)[1] - box(a)[3],
                        "below": box(a)[1] - box(b)[3],
                    }
                    assert gaps[relation] >= 0.079
                    assert max(gaps, key=lambda name: gaps[name]) == relation

    def test_a_place_holds_and_without_one_a_thing_is_in_the_middle(self) -> None:
        rng = np.random.default_rng(5)
        for _ in range(200):
            for place, (x, y) in {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}.items():
                (item,) = arrange(Scene((RED_CIRCLE,), None, place, "white"), rng)
                along, across = (item.x, item.y) if x else (item.y, item.x)
                assert (along - 0.5) * (x + y) >= 0.159
                assert abs(across - 0.5) <= 0.061
            (item,) = arrange(Scene((RED_CIRCLE,), None, None, "white"), rng)
            assert max(abs(item.x - 0.5), abs(item.y - 0.5)) <= 0.061


class TestRendering:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_an_outline_measures_what_it_says(self, shape: str) -> None:
        outline, radius, side = OUTLINES[shape], 0.3, 500
        window, alpha = coverage(shape, 0.5, 0.5, radius, side)
        ys = ((np.arange(side)[window[0]] + 0.5) / side - 0.5) / radius
        assert alpha.sum() / side**2 / radius**2 == pytest.approx(outline.area, rel=1e-3)
        assert (alpha.sum(axis=1) @ ys) / alpha.sum() == pytest.approx(outline.centroid_y, abs=1e-3)
        pixel = 2 / side / radius
        assert np.ptp(ys[alpha.max(axis=1) > 0]) == pytest.approx(2 * outline.half_height, abs=2 * pixel)
        assert (alpha.max(axis=0) > 0).sum() / side / radius == pytest.approx(2 * outline.half_width, abs=2 * pixel)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_coverage_agrees_with_a_sixteen_times_finer_drawing(self, shape: str) -> None:
        (rows, columns), alpha = coverage(shape, 0.47, 0.53, 0.2, 32)
        coarse = np.zeros((32, 32), np.float32)
        coarse[rows, columns] = alpha
        (rows, columns), alpha = coverage(shape, 0.47, 0.53, 0.2, 512)
        fine = np.zeros((512, 512), np.float32)
        fine[rows, columns] = alpha
        assert np.abs(coarse - fine.reshape(32, 16, 32, 16).mean(axis=(1, 3))).max() < 0.05

    def test_parts_outside_the_frame_are_cut_off(self) -> None:
        corner = np.asarray(render((Placed(RED_CIRCLE, 0.0, 1.0, 0.25),), "white", 64))
        assert tuple(corner[-1, 0]) == COLOURS["red"]
        outside = np.asarray(render((Placed(RED_CIRCLE, -3.0, 5.0, 0.25),), "white", 64))
        assert (outside == 255).all()

    def test_colours_are_the_palettes(self) -> None:
        scene = Scene((RED_CIRCLE, BLUE_STAR), "above", None, "black")
        picture = np.asarray(draw(scene, 64, np.random.default_rng(0)))
        assert picture.shape == (64, 64, 3)
        seen = {tuple(int(value) for value in pixel) for pixel in picture.reshape(-1, 3)}
        assert {COLOURS["red"], COLOURS["blue"], BACKGROUNDS["black"]} <= seen


class TestSamples:
    def test_a_picture_depends_on_seed_and_number_alone(self) -> None:
        whole = list(samples(20, seed=7, resolution=32, held_out=False))
        later = list(samples(5, seed=7, resolution=32, held_out=False, start=12))
        assert [s.key for s in later] == [s.key for s in whole[12:17]]
        assert [s.caption for s in later] == [s.caption for s in whole[12:17]]
        assert [s.image.tobytes() for s in later] == [s.image.tobytes() for s in whole[12:17]]
        other = list(samples(20, seed=8, resolution=32, held_out=False))
        assert [s.caption for s in other] != [s.caption for s in whole]

    def test_resolution_changes_neither_caption_nor_scene(self) -> None:
        small = list(samples(50, seed=1, resolution=32, held_out=True))
        large = list(samples(50, seed=1, resolution=64, held_out=True))
        for a, b in zip(small, large, strict=True):
            assert a.caption == b.caption
            assert np.abs(np.asarray(b.image.reduce(2), float) - np.asarray(a.image, float)).mean() < 0.3

    def test_the_share_of_two_objects_and_the_split_are_as_asked(self) -> None:
        for held_out in (False, True):
            scenes = [parse(s.caption) for s in samples(1000, 0, 24, held_out, two_objects=0.3)]
            assert abs(sum(len(s.things) == 2 for s in scenes) - 300) < 4 * sqrt(1000 * 0.3 * 0.7)
            assert {is_held_out(s) for s in scenes} == {held_out}

    def test_keys_are_distinct_and_safe_in_a_shard(self) -> None:
        keys = [s.key for s in samples(30, 0, 24, False)]
        assert len(set(keys)) == 30
        assert all(key.isdigit() for key in keys)

    def test_a_count_or_resolution_without_sense_is_refused(self) -> None:
        with pytest.raises(UserError, match="0 or more"):
            next(samples(-1, 0, 32, False))
        with pytest.raises(UserError, match="24 or more"):
            next(samples(1, 0, 8, False))
