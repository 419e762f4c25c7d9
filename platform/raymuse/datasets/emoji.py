"""Captioned emoji: some 1,360 pictures of Debian's package fonts-noto-color-emoji, on plain backgrounds.

A caption reads "grinning face on a yellow background". Names are the Unicode standard's in lower case, as this
Python's `unicodedata` knows them. So the list, and with it the numbered series of `samples`, is fixed for one font
file and one Python minor version.
"""

import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raymuse.config.errors import UserError
from raymuse.datasets.sample import Sample, check_request, sample_generator, sample_key
from raymuse.datasets.scenes import RGB

DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the one size of the font's bitmaps
CELL = (136, 128)  # of every bitmap, in px

# Soft colours, so that neither the yellow faces nor the black signs vanish in them.
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "gray": (190, 190, 190),
    "yellow": (255, 240, 130),
    "beige": (235, 215, 185),
    "pink": (255, 190, 215),
    "purple": (205, 170, 240),
    "blue": (150, 195, 250),
    "green": (150, 225, 160),
}
FRAME_SHARE = (0.72, 0.88)  # the longer side of the emoji, in frames


@dataclass(frozen=True)
class Emoji:
    character: str
    name: str


def find_font(path: Path = DEBIAN_FONT) -> Path:
    """The colour emoji font.

    Raises:
        UserError: no such file; the message says how to install it.
    """
    if not path.is_file():
        raise UserError(f"no emoji font at {path}: install it with `apt-get install fonts-noto-color-emoji`")
    return path


def emoji(font: Path) -> list[Emoji]:
    """The font's single-code-point emoji with their names, in the order of their code points.

    Raises:
        UserError: the font holds no colour bitmaps that Pillow can draw.
    """
    # ASCII is skipped: its digits, # and * are in the font only as parts of key caps.
    characters = (chr(code) for code in range(0x80, sys.maxunicode + 1))
    found = [Emoji(c, unicodedata.name(c).lower()) for c in characters if _is_symbol(c) and _find_box(c, font)]
    if not found:
        raise UserError(f"{font} draws no emoji: use the NotoColorEmoji.ttf of fonts-noto-color-emoji")
    return found


def _is_symbol(character: str) -> bool:
    """Whether a character can stand alone as a picture: symbols and punctuation, but no parts of longer emoji."""
    if unicodedata.category(character) not in ("So", "Sm", "Po", "Pd", "Ll"):
        return False
    name = unicodedata.name(character, "")
    return bool(name) and not name.startswith(("REGIONAL INDICATOR", "EMOJI MODIFIER", "EMOJI COMPONENT"))


@cache
def _load(font: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(find_font(font)), STRIKE)
    except OSError as error:  # a file that is no font, or a font without bitmaps of this size
        raise UserError(f"{font} is no colour emoji font: use the one of fonts-noto-color-emoji") from error


@cache
def _find_box(character: str, font: Path) -> tuple[int, int, int, int] | None:
    """The bounding box of the character's picture in its cell; None where the font has none, or only an ink drawing."""
    ink = (255, 0, 255)
    cell = Image.new("RGBA", CELL)
    ImageDraw.Draw(cell).text((0, 0), character, fill=ink, font=_load(font), embedded_color=True)
    red, green, blue, alpha = np.moveaxis(np.asarray(cell), 2, 0)
    only_ink = (red == alpha) & (green == 0) & (blue == alpha)  # true of empty pixels too
    return None if only_ink.all() else cell.getbbox()


def draw(character: str, background: str, resolution: int, rng: np.random.Generator, font: Path) -> Image.Image:
    """A square RGB picture of one emoji, with its place and scale drawn from `rng`, wholly inside the frame.

    Raises:
        UserError: the font has no picture of the character, or the background is unknown.
    """
    box = _find_box(character, font)
    if box is None:
        raise UserError(f"{font} has no picture of {character!r}")
    if background not in BACKGROUNDS:
        raise UserError(f"unknown background {background!r}: use one of {', '.join(BACKGROUNDS)}")
    # Drawn straight onto the background: Pillow's text on a transparent cell would leave dark fringes.
    cell = Image.new("RGB", CELL, BACKGROUNDS[background])
    ImageDraw.Draw(cell).text((0, 0), character, font=_load(font), embedded_color=True)

    left, top, right, bottom = box
    scale = rng.uniform(*FRAME_SHARE) * resolution / max(right - left, bottom - top)
    width, height = (max(round(side * scale), 1) for side in (right - left, bottom - top))
    small = cell.resize((width, height), Image.Resampling.LANCZOS, box=box)
    canvas = Image.new("RGB", (resolution, resolution), BACKGROUNDS[background])
    canvas.paste(small, (int(rng.integers(resolution - width + 1)), int(rng.integers(resolution - height + 1))))
    return canvas


def caption(name: str, background: str) -> str:
    return f"{name} on a {background} background"


def is_held_out(character: str, background: str) -> bool:
    """Whether training never shows this emoji on this background: one background of the eight for each emoji."""
    return list(BACKGROUNDS).index(background) == ord(character) % len(BACKGROUNDS)


def samples(
    count: int, seed: int, resolution: int, held_out: bool, start: int = 0, font: Path = DEBIAN_FONT
) -> Iterator[Sample]:
    """Pictures number `start` to `start + count - 1` of an endless, seeded series.

    The split's (emoji, background) pairs come in an order shuffled by the seed, each once before any comes again with
    another place and scale. Picture i depends on (seed, i) alone, so that shards can be drawn in any order.

    Args:
        count: how many.
        seed: of the series, 0 or more.
        resolution: side in pixels, 24 or more.
        held_out: the split: pairs that training never shows, or the seven in eight that it does.
        start: number of the first picture.
        font: as `find_font` gives it.

    Raises:
        UserError: no such font, or a count or resolution that makes no sense.
    """
    check_request(count, start, resolution)
    pairs = [(one, b) for one in emoji(font) for b in BACKGROUNDS if is_held_out(one.character, b) == held_out]
    order = np.random.default_rng(seed).permutation(len(pairs))
    for index in range(start, start + count):
        one, background = pairs[order[index % len(pairs)]]
        image = draw(one.character, background, resolution, sample_generator(seed, index), font)
        yield Sample(sample_key(index), image, caption(one.name, background))
