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
HEAD_LINES = 6
Table = Sequence[Sequence[str]]
BEST = "#00795a"  # frames and notes of what is better
EDGE = "#dddddd"  # around a picture, which may be as white as the sheet


@dataclass(frozen=True)
class Entry:
    """A prompt and its pictures, each uint8 (H, W, 3), in the order of the sheet's labels.

    Attributes:
        notes: what is said under each picture; empty: nothing is.
        best: place of the picture that is framed; None: none is.
    """

    prompt: str
    pictures: tuple[NDArray[np.uint8], ...]
    notes: tuple[str, ...] = ()
    best: int | None = None


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
            corner = (left + place * (CELL + 2), top)
            canvas.paste(_cell(pixels), corner)
            draw.rectangle((corner[0] - 1, top - 1, corner[0] + CELL, top + CELL), outline=EDGE)
            if place == entry.best:
                draw.rectangle((*corner, corner[0] + CELL - 1, top + CELL - 1), outline=BEST, width=3)
        for place, note in enumerate(entry.notes):
            colour = BEST if place == entry.best else "#666"
            draw.text((left + place * (CELL + 2), top + CELL + 1), note, fill=colour, font=font)
        below = top + CELL + (14 if entry.notes else 2)
        text = _wrapped(draw, entry.prompt, font, wide, lines=2 if entry.notes else 3)
        draw.multiline_text((left, below), text, fill="black", font=font)
    return canvas


def grid_png(rows: Sequence[Sequence[NDArray[np.uint8]]], labels: Sequence[str], prompts: Sequence[str]) -> Image.Image:
    """Pictures uint8 (H, W, 3) in rows with a label at the left of each, and a prompt above each column."""
    font = ImageFont.load_default(11)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * MARGIN + int(max(measure.multiline_textbbox((0, 0), label, font=font)[2] for label in labels))
    heads = [_wrapped(measure, prompt, font, CELL, lines=HEAD_LINES) for prompt in prompts]
    head = 2 * MARGIN + int(max((measure.multiline_textbbox((0, 0), text, font=font)[3] for text in heads), default=0))
    columns = max(len(row) for row in rows)
    step = CELL + 4
    canvas = Image.new("RGB", (left + columns * step + MARGIN, head + len(rows) * step + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(heads):
        draw.multiline_text((left + number * step, MARGIN), text, fill="black", font=font)
    for number, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        top = head + number * step
        draw.multiline_text((MARGIN, top + CELL // 2), label, fill="black", font=font, anchor="lm")
        for place, pixels in enumerate(pictures):
            corner = (left + place * step, top)
            canvas.paste(_cell(pixels), corner)
            draw.rectangle((corner[0] - 1, top - 1, corner[0] + CELL, top + CELL), outline=EDGE)
    return canvas


def sheet_html(entries: Sequence[Entry], labels: Sequence[str], title: str, table: Table = ()) -> str:
    """One self-contained page; typing in its box keeps the prompts that hold every word.

    Args:
        table: rows of cells above the pictures, the first row its heads; empty: none.
    """
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
img.best {{ outline: 3px solid {BEST}; outline-offset: -3px }} .notes {{ display: flex; font-size: .8rem; color: #666 }}
.notes span {{ width: 132px }} .notes .best {{ color: {BEST}; font-weight: 600 }}
table {{ border-collapse: collapse; margin: .5rem 0 1.2rem }} td, th {{ padding: .25rem .7rem; text-align: left;
  border-bottom: 1px solid #ddd }}
</style>
<header><h1>{html.escape(title)}</h1><span>{legend}</span>
<input id="q" type="search" placeholder="search prompts" aria-label="search prompts"><span id="n"></span></header>
{_table(table)}<main>
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


def _table(rows: Table) -> str:
    if not rows:
        return ""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    return "<table>" + "".join(lines) + "</table>\n"


def _figure(entry: Entry, labels: Sequence[str]) -> str:
    images = "".join(
        f'<img src="data:image/png;base64,{base64.b64encode(png_bytes(pixels, {})).decode()}" '
        f'alt="{html.escape(label)}" title="{html.escape(label)}"{" class=best" if place == entry.best else ""}>'
        for place, (pixels, label) in enumerate(zip(entry.pictures, labels, strict=True))
    )
    notes = "".join(
        f"<span{' class=best' if place == entry.best else ''}>{html.escape(note)}</span>"
        for place, note in enumerate(entry.notes)
    )
    said = f"<div class=notes>{notes}</div>" if notes else ""
    return f"<figure>{images}{said}<figcaption>{html.escape(entry.prompt)}</figcaption></figure>"


def _cell(pixels: NDArray[np.uint8]) -> Image.Image:
    """Small pictures grow by whole pixels where that fits, so that what was drawn is what is seen."""
    image = Image.fromarray(pixels)
    return image.resize((CELL, CELL), Image.Resampling.NEAREST if image.width <= CELL else Image.Resampling.LANCZOS)


def _wrapped(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    width: int,
    lines: int = 3,
) -> str:
    """At most so many lines of a width in pixels; what is left out is an ellipsis."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width:
            found[-1] = longer
        else:
            found.append(word)
    if len(found) <= lines:
        return "\n".join(found)
    last = found[lines - 1]
    while last and draw.textlength(f"{last}...", font=font) > width:
        last = last[:-1]
    return "\n".join([*found[: lines - 1], f"{last}..."])
