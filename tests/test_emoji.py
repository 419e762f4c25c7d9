"""The captioned emoji. Drawing needs the package fonts-noto-color-emoji; the errors of its absence do not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.datasets.emoji import (
    BACKGROUNDS,
    DEBIAN_FONT,
    caption,
    draw,
    emoji,
    find_font,
    is_held_out,
    samples,
)

needs_font = pytest.mark.skipif(
    not DEBIAN_FONT.is_file(),
    reason=f"drawing emoji needs {DEBIAN_FONT}: apt-get install fonts-noto-color-emoji",
)


def test_a_missing_font_says_how_to_install_it(tmp_path: Path) -> None:
    missing = tmp_path / "no.ttf"
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        find_font(missing)
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        next(samples(1, 0, 32, False, font=missing))


def test_a_file_that_is_no_font_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.ttf"
    wrong.write_bytes(b"not a font")
    with pytest.raises(UserError, match="no colour emoji font"):
        emoji(wrong)


def test_a_text_font_has_no_emoji() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the text font of this test comes with matplotlib")
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(UserError, match="draws no emoji"):
        emoji(font)


def test_one_background_of_each_emoji_is_held_out() -> None:
    for character in map(chr, range(0x1F600, 0x1F640)):
        assert sum(is_held_out(character, background) for background in BACKGROUNDS) == 1


@needs_font
class TestList:
    def test_holds_the_font_once_sorted_by_code_point(self) -> None:
        found = emoji(find_font())
        assert 1300 <= len(found) <= 1450
        characters = [one.character for one in found]
        assert characters == sorted(set(characters))
        names = {one.character: one.name for one in found}
        assert names["\N{GRINNING FACE}"] == "grinning face"
        assert "\N{COPYRIGHT SIGN}" in names

    def test_leaves_out_parts_of_longer_emoji(self) -> None:
        characters = {one.character for one in emoji(find_font())}
        parts = "0123456789#*\u200d\u20e3\ufe0f\U0001f1e6\U0001f1ff\U0001f3fb\U0001f3ff\U0001f9b0"
        assert not characters & set(parts)


@needs_font
class TestDrawing:
    @pytest.mark.parametrize("resolution", [32, 64, 200])
    def test_draws_in_colour_on_the_plain_background(self, resolution: int) -> None:
        for background, colour in BACKGROUNDS.items():
            image = draw("\N{GRINNING FACE}", background, resolution, np.random.default_rng(0), find_font())
            assert (image.mode, image.size) == ("RGB", (resolution, resolution))
            pixels = np.asarray(image)
            assert 0.2 < (pixels == colour).all(axis=2).mean() < 0.7  # a disc of 0.72 to 0.88 covers 0.41 to 0.61
            assert pixels.std(axis=(0, 1)).max() > 20

    def test_place_and_scale_come_from_the_generator(self) -> None:
        one, same, other = (
            draw("\N{RED APPLE}", "blue", 64, np.random.default_rng(seed), find_font()) for seed in (0, 0, 1)
        )
        assert one.tobytes() == same.tobytes()
        assert one.tobytes() != other.tobytes()

    def test_edges_have_no_dark_fringe(self) -> None:
        """A white disc on white is darker nowhere than its own gray rim, which is light."""
        image = draw("\N{MEDIUM WHITE CIRCLE}", "white", 64, np.random.default_rng(0), find_font())
        assert np.asarray(image).min() > 120

    def test_refuses_what_it_cannot_draw(self) -> None:
        rng = np.random.default_rng(0)
        with pytest.raises(UserError, match="no picture of 'A'"):
            draw("A", "white", 32, rng, find_font())
        with pytest.raises(UserError, match="unknown background 'teal'"):
            draw("\N{GRINNING FACE}", "teal", 32, rng, find_font())


@needs_font
class TestSamples:
    def test_a_picture_depends_on_seed_and_number_alone(self) -> None:
        whole = list(samples(20, seed=7, resolution=32, held_out=False))
        later = list(samples(5, seed=7, resolution=32, held_out=False, start=12))
        assert [(s.key, s.caption, s.image.tobytes()) for s in later] == [
            (s.key, s.caption, s.image.tobytes()) for s in whole[12:17]
        ]
        assert isinstance(whole[0].image, Image.Image)

    def test_splits_share_no_pair_and_cover_every_emoji_before_repeating(self) -> None:
        found = emoji(find_font())
        held_out = [s.caption for s in samples(len(found) + 5, 0, 24, True)]
        assert len(set(held_out)) == len(found)
        expected = {
            caption(one.name, background)
            for one in found
            for background in BACKGROUNDS
            if is_held_out(one.character, background)
        }
        assert set(held_out) == expected
        training = {s.caption for s in samples(500, 0, 24, False)}
        assert len(training) == 500
        assert not training & expected
