"""`make bench-generate`: our pipeline beside diffusers' AmusedPipeline, and our sampler beside lucidrains' MaskGit.

`python tests/benchmarks/generate.py [PATTERN ...]` runs the rows whose name or peer has one of the patterns, else all.

diffusers: the same weights and the same work, prompt to picture: text encoder, all steps, VQGAN. Both draw greedily
once before, and must give the same ids. lucidrains: Muse's transformer of the same width, depth, heads, ids and codes,
random weights, text states to ids (see lucidrains_peer.py); the two may differ by 5 % of their parameters.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from diffusers import AmusedPipeline
from models import GUIDANCE, PROMPT, SIZES, STEPS, write_model
from peers import environment, python_of, versions_of
from report import OF_WHAT, PROCESSOR, THREADS, Row, clock, compare, write

from raymuse.config.sampling import SamplingConfig
from raymuse.drawing.sampler import Course, sample_ids
from raymuse.models.maskgit import MaskGit, MaskGitConfig
from raymuse.pipeline import Pipeline

PACKAGES = ("torch", "diffusers", "transformers")
LUCIDRAINS = {
    "demo": {"width": 96, "layers": 6, "heads": 4, "side": 8, "codes": 256, "text_width": 96},
    "36M": {"width": 384, "layers": 12, "heads": 6, "side": 16, "codes": 8192, "text_width": 256},
}
TEXT_LENGTH, MLP = 77, 4


@dataclass(frozen=True)
class Comparison:
    """With diffusers: one of `SIZES` at a batch, `ours` in one of its ways to run, guided in `span` of the steps."""

    size: str
    batch: int
    goal: float
    ours: Literal["eager", "traced", "compiled"] = "eager"
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def name(self) -> str:
        said = "demo's size" if self.size == "demo" else self.size
        half = "" if self.span == (0.0, 1.0) else ", guidance on half of the steps"
        return f"{said}, batch {self.batch}{half}{'' if self.ours == 'eager' else f', ours {self.ours}'}"


COMPARISONS = (
    Comparison("demo", 1, 2.0),
    Comparison("demo", 1, 2.0, "traced"),
    Comparison("36M", 1, 1.3),
    Comparison("36M", 1, 1.3, "traced"),
    Comparison("36M", 8, 1.3),
    Comparison("36M", 1, 1.7, span=(0.0, 0.5)),
    Comparison("demo", 1, 2.0, "compiled"),
    Comparison("36M", 1, 1.3, "compiled"),
    Comparison("36M", 8, 1.3, "compiled"),
)


def main(patterns: list[str]) -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    rows: list[Row] = []
    try:
        for wanted in COMPARISONS:
            if chosen(patterns, wanted.name, "diffusers-amused"):
                if not (root / wanted.size).exists():
                    write_model(root / wanted.size, **SIZES[wanted.size])
                rows.append(row(str(root / wanted.size), wanted))
        for size in LUCIDRAINS:
            if chosen(patterns, lucidrains_name(size), "lucidrains"):
                rows.append(lucidrains_row(size))
    finally:
        shutil.rmtree(root)
    write("generate", rows, keep=bool(patterns))


def chosen(patterns: list[str], *names: str) -> bool:
    return not patterns or any(re.search(pattern, name) for pattern in patterns for name in names)


def row(folder: str, wanted: Comparison) -> Row:
    ours, theirs = Pipeline.load(folder, batch_size=wanted.batch), AmusedPipeline.from_pretrained(folder)
    if wanted.ours != "eager":
        ours = ours.compiled() if wanted.ours == "compiled" else ours.traced()
    theirs.set_progress_bar_config(disable=True)
    same_ids(Pipeline.load(folder, batch_size=1), theirs)
    prompts, how = (
        [PROMPT] * wanted.batch,
        {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "output_type": "np",
            "generator": torch.Generator().manual_seed(0),
        },
    )
    return compare(
        wanted.name,
        "diffusers-amused",
        lambda: rate(
            quietly(lambda: ours(prompts, seeds=range(wanted.batch), guidance_span=wanted.span)), wanted.batch
        ),
        lambda: rate(
            quietly(lambda: theirs(prompts, **how)),
            wanted.batch,
        ),
        goal=wanted.goal,
        unit=f"pictures/s{OF_WHAT}",
        packages=PACKAGES,
    )


def lucidrains_name(size: str) -> str:
    return f"Muse's transformer, {size}-shaped, batch 1, states to ids"


def lucidrains_row(size: str) -> Row:
    shape = LUCIDRAINS[size]
    rest = {
        "text_length": TEXT_LENGTH,
        "mlp": MLP,
        "batch": 1,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "threads": THREADS,
    }
    script = str(Path(__file__).with_name("lucidrains_peer.py").absolute())
    command = [python_of("lucidrains"), script, json.dumps({**shape, **rest})]
    peer = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment(THREADS),
    )  # fmt: skip
    assert peer.stdin is not None
    assert peer.stdout is not None
    told, asked = peer.stdout, peer.stdin

    def theirs() -> float:
        asked.write("draw\n")
        asked.flush()
        return float(json.loads(told.readline())["processor" if PROCESSOR else "seconds"])

    network = maskgit(shape)
    counts = [json.loads(told.readline())["parameters"], sum(p.numel() for p in network.parameters())]
    print(f"{size}: lucidrains {counts[0] / 1e6:.2f}, ours {counts[1] / 1e6:.2f} million parameters")
    assert abs(counts[1] / counts[0] - 1) < 0.05, "the two are not of equal shape"
    try:
        return compare(
            lucidrains_name(size), "lucidrains", lambda: rate(sampler(network, shape), 1), lambda: rate(theirs, 1),
            goal=1.0, unit=f"pictures/s{OF_WHAT}", packages=PACKAGES,
            peer_versions=versions_of("lucidrains", ("muse-maskgit-pytorch", "torch")),
        )  # fmt: skip
    finally:
        asked.close()
        peer.wait()


def maskgit(shape: dict[str, int]) -> MaskGit:
    """Muse's base as lucidrains shapes it: its GEGLU's three matrices weigh as much as two of 4 times the width."""
    config = MaskGitConfig(
        hidden_size=shape["width"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        intermediate_size=MLP * shape["width"], encoder_hidden_size=shape["text_width"], vocab_size=shape["codes"] + 64,
        codebook_size=shape["codes"], sample_size=shape["side"], qk_norm=True,
    )  # fmt: skip
    network = MaskGit(config).eval()
    network.initialise(0)
    return network.requires_grad_(False)


def sampler(network: MaskGit, shape: dict[str, int]) -> Callable[[], None]:
    """All steps from text states to ids."""
    side, sampling = shape["side"], SamplingConfig(steps=STEPS, guidance=GUIDANCE)
    none = torch.zeros(1, 0), torch.zeros(1, 5)
    ids = torch.full((1, side, side), network.config.mask_id)

    @torch.no_grad()
    def draw() -> None:
        states = torch.randn(2, TEXT_LENGTH, shape["text_width"])
        told, free = (network.condition(states[row : row + 1], *none) for row in range(2))
        course = Course.of(sampling, side * side)
        sample_ids(network, told, free, ids=ids, seeds=[0], courses=[course])

    return draw


def rate(draw: Callable[[], float | None], batch: int) -> float:
    """Pictures a second over as many draws as fit into four seconds (two of a processor), after one that warms up.

    Args:
        draw: may say itself what a draw took.
    """
    draw()
    spent, count = 0.0, 0
    while spent < (2 if PROCESSOR else 4):
        began = clock()
        took = draw()
        spent += clock() - began if took is None else took
        count += batch
    return count / spent


def quietly(draw: Callable[[], object]) -> Callable[[], None]:
    def drawn() -> None:
        draw()

    return drawn


def same_ids(ours: Pipeline, theirs: AmusedPipeline) -> None:
    """Without chance, both draw the same picture: the work is the same.

    In 11 steps: in 12, diffusers' fp32 cosine masks one id less after the eighth.
    """
    sample = torch.multinomial
    torch.multinomial = lambda probabilities, *_, **__: probabilities.argmax(-1, keepdim=True)
    try:
        wanted = theirs(
            [PROMPT], num_inference_steps=11, guidance_scale=GUIDANCE, temperature=(0, 0), output_type="latent"
        ).images
    finally:
        torch.multinomial = sample
    drawn = ours([PROMPT], seeds=[0], steps=11, temperature=0.0, top_k=1).ids
    assert np.array_equal(drawn, wanted.numpy().reshape(drawn.shape)), "the two do not draw the same ids"


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    main(sys.argv[1:])
