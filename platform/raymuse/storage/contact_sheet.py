"""Contact sheets: prompts beside their pictures, as one PNG and as a page with search."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raymuse.storage.pictures import png_bytes

CELL = 96
MARGIN = 8
TEXT_HEIGHT = 46
COLUMNS = 6


@dataclass(frozen=True)
class Entry:
    """A prompt and its pictures, each uint8 (H, W, 3), in the order of the sheet's labels."""

    prompt: str
    pictures: tuple[NDArray[np.uint8], ...]


def sheet_png(entries: Sequence[Entry], labels: Sequence[str], title: str) -> Image.Image:
    """A grid of entries: the pictures side by side at one size, the prompt under them."""
    wide = len(labels) * CELL + (len(labels) - 1) * 2
    columns = min(COLUMNS, max(1, len(entries)))
    rows = -(-len(entries) // columns)
    width = MARGIN + columns * (wide + MARGIN)
    canvas = Image.new("RGB", (width, 40 + rows * (CELL + TEXT_HEIGHT + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 12), f"{title}   ({' | '.join(labels)})", fill="black", font=ImageFont.load_default(15))
    font = ImageFont.load_default(11)
    for number, entry in enumerate(entries):
        left = MARGIN + (number % columns) * (wide + MARGIN)
        top = 40 + (number // columns) * (CELL + TEXT_HEIGHT + MARGIN)
        for place, pixels in enumerate(entry.pictures):
            canvas.paste(_cell(pixels), (left + place * (CELL + 2), top))
        draw.multiline_text((left, top + CELL + 2), _wrapped(draw, entry.prompt, font, wide), fill="black", font=font)
    return canvas


def sheet_html(entries: Sequence[Entry], labels: Sequence[str], title: str) -> str:
    """One self-contained page; typing in its box keeps the prompts that hold every word."""
    figures = "\n".join(_figure(entry, labels) for entry in entries)
    legend = html.escape(" | ".join(labels))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #222; background: #fafafa }}
header {{ display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap; position: sticky; top: 0;
  background: #fafafa; padding: .5rem 0 }}
h1 {{ font-size: 1.3rem; margin: 0 }} input {{ font: inherit; padding: .3rem .6rem; width: 20rem }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({len(labels) * 134 + 18}px, 1fr)); gap: 1rem }}
figure {{ margin: 0; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .5rem }}
img {{ width: 128px; height: 128px; image-rendering: pixelated }} figcaption {{ margin-top: .3rem; font-size: .85rem }}
</style>
<header><h1>{html.escape(title)}</h1><span>{legend}</span>
<input id="q" type="search" placeholder="search prompts" aria-label="search prompts"><span id="n"></span></header>
<main>
{figures}
</main>
<script>
const figures = [...document.querySelectorAll("figure")], box = document.getElementById("q");
function show() {{
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const figure of figures) {{
    const text = figure.textContent.toLowerCase();
    figure.hidden = !words.every(word => text.includes(word));
    shown += !figure.hidden;
  }}
  document.getElementById("n").textContent = shown + " of " + figures.length;
}}
box.addEventListener("input", show); show();
</script>
</html>
"""


def _figure(entry: Entry, labels: Sequence[str]) -> str:
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png_bytes(pixels, {})).decode()}" '
        f'alt="{html.escape(label)}" title="{html.escape(label)}">'
        for pixels, label in zip(entry.pictures, labels, strict=True)
    )
    return f"<figure>{images}<figcaption>{html.escape(entry.prompt)}</figcaption></figure>"


def _cell(pixels: NDArray[np.uint8]) -> Image.Image:
    """Small pictures grow by whole pixels where that fits, so that what was drawn is what is seen."""
    image = Image.fromarray(pixels)
    return image.resize((CELL, CELL), Image.Resampling.NEAREST if image.width <= CELL else Image.Resampling.LANCZOS)


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:3])
