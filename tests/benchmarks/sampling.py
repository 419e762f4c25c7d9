"""`python tests/benchmarks/sampling.py MODEL PROMPTS`: how good and how fast the base draws with each sampling option.

MODEL is one of shapes (`runs/demo/model`), PROMPTS a .jsonl with a column `prompt` (`runs/demo/data/prompts.jsonl`).
The judge looks at the base's pictures of the captions with one object; a line an option, of the same seeds.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from raymuse.datasets.judge import judge
from raymuse.datasets.scenes import parse
from raymuse.pipeline import Options, Pipeline

TRIED: dict[str, Options] = {
    "as the model says": {},
    "guidance 1": {"guidance": 1.0},
    "guidance 1.5": {"guidance": 1.5},
    "guidance 3": {"guidance": 3.0},
    "guidance rising to 3, linear": {"guidance": 3.0, "guidance_schedule": "linear"},
    "guidance rising to 4, cosine": {"guidance": 4.0, "guidance_schedule": "cosine"},
    "guidance on the first half": {"guidance_span": (0.0, 0.5)},
    "guidance on the first three quarters": {"guidance_span": (0.0, 0.75)},
    "guidance on the last half": {"guidance_span": (0.5, 1.0)},
    "guidance 3 on the last half": {"guidance": 3.0, "guidance_span": (0.5, 1.0)},
    "linear": {"masking": "linear"},
    "arccos": {"masking": "arccos"},
    "square": {"masking": "square"},
    "root": {"masking": "root"},
    "power": {"masking": "power"},
    "sigmoid": {"masking": "sigmoid"},
    "halton": {"order": "halton"},
    "random order": {"order": "random"},
    "temperature 0": {"temperature": 0.0},
    "temperature 2": {"temperature": 2.0},
    "top_k 3": {"top_k": 3},
    "6 steps": {"steps": 6},
    "8 steps": {"steps": 8},
    "18 steps": {"steps": 18},
}


def main() -> None:
    torch.set_num_threads(2)
    pipeline = replace(Pipeline.load(sys.argv[1], batch_size=16), superres=None, superres_vqgan=None)
    lines = Path(sys.argv[2]).read_text().splitlines()
    captions = [
        caption for caption in (json.loads(line)["prompt"] for line in lines) if len(parse(caption).things) == 1
    ]
    print(f"{len(captions)} captions\n| option | one object right | pictures/s |\n|---|---|---|")
    for name, options in TRIED.items():
        began = time.perf_counter()
        pixels = pipeline(captions, seeds=range(len(captions)), **options).pixels
        rate = len(captions) / (time.perf_counter() - began)
        right = np.mean([judge(picture, caption).correct for picture, caption in zip(pixels, captions, strict=True)])
        error = (right * (1 - right) / len(captions)) ** 0.5
        print(f"| {name} | {right:.1%} +- {error:.1%} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
