"""`python tests/benchmarks/sheets.py MODEL`: docs/edit.png and docs/sampling.png, of a model of shapes."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sampling import OPTIONS

from raymuse.datasets import shapes
from raymuse.encoding.pictures import downscale
from raymuse.pipeline import Drawn, Pipeline

COUNT, LABEL, GAP = 6, 190, 4
CIRCLE = "a large red circle on a white background"
Row = tuple[str, Sequence[NDArray[np.uint8]]]


def main() -> None:
    pipeline = Pipeline.load(sys.argv[1], batch_size=COUNT)
    samples = list(shapes.samples(COUNT, 5, pipeline.settings.size, held_out=False))
    pictures, captions = [np.asarray(sample.image) for sample in samples], [sample.caption for sample in samples]
    seeds = list(range(COUNT))
    sheet(edits(pipeline, pictures, captions, seeds)).save("docs/edit.png", optimize=True)
    drawn = [(name, pixels(pipeline(captions, seeds=seeds, **options))) for name, options in OPTIONS.items()]
    sheet([("true", pictures), *drawn]).save("docs/sampling.png", optimize=True)


def edits(pipeline: Pipeline, pictures: list[NDArray[np.uint8]], captions: list[str], seeds: list[int]) -> list[Row]:
    side = pipeline.settings.size
    middle = np.zeros((side, side), dtype=bool)
    middle[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    right = np.zeros((side, side), dtype=bool)
    right[:, side // 2 :] = True
    stars = [f"a large green star on a {caption.split(' on a ')[-1]}" for caption in captions]
    circles, masks = [CIRCLE] * COUNT, [middle] * COUNT
    small = [downscale(picture, pipeline.settings.base_size) for picture in pictures]
    return [
        ("given", pictures),
        (
            "image-to-image 0.5, red circle",
            pixels(pipeline.edit("image-to-image", circles, pictures, seeds=seeds, strength=0.5)),
        ),
        (
            "image-to-image 0.9, red circle",
            pixels(pipeline.edit("image-to-image", circles, pictures, seeds=seeds, strength=0.9)),
        ),
        ("inpaint middle, green star", pixels(pipeline.edit("inpaint", stars, pictures, seeds=seeds, masks=masks))),
        (
            "inpaint right, paste",
            pixels(pipeline.edit("inpaint", captions, pictures, seeds=seeds, masks=[right] * COUNT, paste=True)),
        ),
        ("mask-free, red circle", pixels(pipeline.edit("mask-free", circles, pictures, seeds=seeds, guidance=4.0))),
        ("given at the base's size", [np.asarray(Image.fromarray(one).resize((side, side))) for one in small]),
        ("super-resolution of it", pixels(pipeline.edit("super-resolution", captions, small, seeds=seeds))),
    ]


def pixels(drawn: Drawn) -> list[NDArray[np.uint8]]:
    return [picture.pixels for picture in drawn.pictures]


def sheet(rows: Sequence[Row]) -> Image.Image:
    side = rows[0][1][0].shape[0]
    canvas = Image.new("RGB", (LABEL + COUNT * (side + GAP), len(rows) * (side + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (name, pictures) in enumerate(rows):
        top = number * (side + GAP)
        pen.text((6, top + side // 2 - 8), name, "black", font)
        for column, picture in enumerate(pictures):
            left = LABEL + column * (side + GAP)
            canvas.paste(Image.fromarray(picture), (left, top))
            pen.rectangle((left - 1, top - 1, left + side, top + side), outline="lightgray")
    return canvas.quantize(256, dither=Image.Dither.NONE)  # a third of the bytes


if __name__ == "__main__":
    assert Path("docs").is_dir(), "run it from the repository's root"
    main()
