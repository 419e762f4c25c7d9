"""`python tests/benchmarks/sampling.py MODEL PROMPTS`: how well and how fast a model draws with each sampling option.

MODEL is one of shapes (`runs/demo/model`), PROMPTS a .jsonl with a column `prompt` (`runs/demo/data/prompts.jsonl`).
The judge looks at the pictures of the captions with one object; a line an option, of the same seeds: the base's, then,
with the base as it is, the super-resolution's.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raymuse.config.sampling import Options
from raymuse.datasets.judge import judge
from raymuse.datasets.scenes import parse
from raymuse.pipeline import Pipeline
from raymuse.scoring.measures import render_error

AS_IT_IS = "as the model says"
OPTIONS: dict[str, Options] = {
    AS_IT_IS: {},
    **{f"masking: {name}": {"masking": name} for name in ("linear", "arccos", "square", "root", "power", "sigmoid")},
    "order: halton": {"order": "halton"},
    "order: random": {"order": "random"},
    "guidance 1 (none)": {"guidance": 1.0},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 3": {"guidance": 3.0},
    "guidance 4": {"guidance": 4.0},
    "guidance to 4, linear": {"guidance": 4.0, "guidance_schedule": "linear"},
    "guidance to 4, cosine": {"guidance": 4.0, "guidance_schedule": "cosine"},
    "guidance, first half": {"guidance_span": (0.0, 0.5)},
    "guidance, last half": {"guidance_span": (0.5, 1.0)},
    "temperature 0": {"temperature": 0.0},
    "temperature 2": {"temperature": 2.0},
    "top_k 3": {"top_k": 3},
    "top_p 0.5": {"top_p": 0.5},
    "6 steps": {"steps": 6},
    "24 steps": {"steps": 24},
}
HIGH_OPTIONS: dict[str, Options] = {
    AS_IT_IS: {},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 2": {"guidance": 2.0},
    "temperature 0": {"temperature": 0.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 2": {"temperature": 2.0},
    "top_p 0.4": {"top_p": 0.4},
    "order: halton": {"order": "halton"},
    "linear": {"masking": "linear"},
    "2 steps": {"steps": 2},
    "16 steps": {"steps": 16},
}


def main() -> None:
    torch.set_num_threads(2)
    pipeline = Pipeline.load(sys.argv[1], batch_size=16)
    lines = Path(sys.argv[2]).read_text().splitlines()
    captions = [
        caption for caption in (json.loads(line)["prompt"] for line in lines) if len(parse(caption).things) == 1
    ]
    seeds = range(len(captions))
    alone = replace(pipeline, superres=None, superres_vqgan=None)
    print(f"{len(captions)} captions\n\n| base | one object right | pictures/s |\n|---|---|---|")
    for name, options in OPTIONS.items():
        began = time.perf_counter()
        pixels = alone(captions, seeds=seeds, **options).pixels
        rate = len(captions) / (time.perf_counter() - began)
        print(f"| {name} | {_right(pixels, captions)} | {rate:.1f} |", flush=True)
    if pipeline.settings.superres is None:
        return
    print("\n| super-resolution | one object right | error less the enlarged base's, grey levels |\n|---|---|---|")
    for name, options in HIGH_OPTIONS.items():
        settings = replace(pipeline.settings, superres=pipeline.settings.superres.model_copy(update=dict(options)))
        drawn = replace(pipeline, settings=settings)(captions, seeds=seeds)
        print(f"| {name} | {_right(drawn.pixels, captions)} | {_nearer(drawn.pixels, drawn.base_pixels, captions)} |")


def _right(pixels: NDArray[np.uint8], captions: list[str]) -> str:
    right = np.mean([judge(picture, caption).correct for picture, caption in zip(pixels, captions, strict=True)])
    return f"{right:.1%} +- {(right * (1 - right) / len(captions)) ** 0.5:.1%}"


def _nearer(pixels: NDArray[np.uint8], base: NDArray[np.uint8], captions: list[str]) -> str:
    side = pixels.shape[1]
    differences = np.array(
        [
            render_error(high, said, side) - render_error(low, said, side)
            for high, low, said in zip(pixels, base, captions, strict=True)
        ]
    )
    return f"{differences.mean():+.2f} +- {1.96 * differences.std(ddof=1) / len(captions) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
