"""`python tests/benchmarks/sampling.py MODEL PROMPTS [OPTION ...]`: how well and fast a model draws with each option.

MODEL is one of shapes (`runs/demo/model`), PROMPTS a .jsonl with a column `prompt` (`runs/demo/data/prompts.jsonl`).
The judge looks at the pictures of the captions with one object; a line an option, of the same seeds: the base's, then,
with the base as it is, the super-resolution's. Of all options, or those that are named, beside the model as it is.
Differences are of pairs: the same caption and seed with and without the option.
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
    "guidance every 2nd step": {"guidance_every": 2},
    "guidance every 3rd step": {"guidance_every": 3},
    "masked only": {"masked_only": True},
    "order: critic": {"order": "critic"},
    "decode: drawn": {"decode": "drawn"},
    "decode: mean": {"decode": "mean"},
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
    "masked only": {"masked_only": True},
    "decode: drawn": {"decode": "drawn"},
    "decode: mean": {"decode": "mean"},
}


def main() -> None:
    torch.set_num_threads(1)
    pipeline = Pipeline.load(sys.argv[1], batch_size=16)
    lines = Path(sys.argv[2]).read_text().splitlines()
    captions = [
        caption for caption in (json.loads(line)["prompt"] for line in lines) if len(parse(caption).things) == 1
    ]
    seeds = range(len(captions))
    names = {AS_IT_IS, *(sys.argv[3:] or (*OPTIONS, *HIGH_OPTIONS))}
    alone = replace(pipeline, superres=None, superres_vqgan=None)
    print(f"{len(captions)} captions\n\n| base | one object right | difference | pictures/s | of a core |")
    print("|---|---|---|---|---|")
    before: NDArray[np.bool_] | None = None
    for name in (name for name in OPTIONS if name in names and (alone.critic or "critic" not in name)):
        began, spent = time.perf_counter(), time.process_time()
        pixels = alone(captions, seeds=seeds, **OPTIONS[name]).pixels
        rates = len(captions) / (time.perf_counter() - began), len(captions) / (time.process_time() - spent)
        right = _right(pixels, captions)
        before = right if before is None else before
        print(f"| {name} | {_share(right)} | {_change(right, before)} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True)
    if pipeline.settings.superres is None:
        return
    print("\n| super-resolution | one object right | error less the enlarged base's, grey levels |\n|---|---|---|")
    for name in (name for name in HIGH_OPTIONS if name in names):
        drawn = pipeline(captions, seeds=seeds, superres=HIGH_OPTIONS[name])
        share, error = _share(_right(drawn.pixels, captions)), _nearer(drawn.pixels, drawn.base_pixels, captions)
        print(f"| {name} | {share} | {error} |", flush=True)


def _right(pixels: NDArray[np.uint8], captions: list[str]) -> NDArray[np.bool_]:
    return np.array([judge(picture, caption).correct for picture, caption in zip(pixels, captions, strict=True)])


def _share(right: NDArray[np.bool_]) -> str:
    share = right.mean()
    return f"{share:.1%} +- {(share * (1 - share) / len(right)) ** 0.5:.1%}"


def _change(right: NDArray[np.bool_], before: NDArray[np.bool_]) -> str:
    """The difference in points, and its standard error, of pairs."""
    difference = right.astype(float) - before
    return f"{100 * difference.mean():+.1f} +- {100 * difference.std(ddof=1) / len(right) ** 0.5:.1f}"


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
