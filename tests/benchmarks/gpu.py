"""`make bench-gpu`: real sizes with random weights on one CUDA GPU: rates, memory, and the share of the GPU's limit.

`python tests/benchmarks/gpu.py [generate|train|encode ...] [cpu]`, else all; `cpu` runs every part once at the demo's
size on the CPU, to see that it runs. bf16 throughout, as a user would draw and train; the VQGAN's own precision is the
project's. The limit is what the GPU multiplies in bf16, measured first, over what a picture takes (docs/scale.md counts
it). Speed does not depend on the weights.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AmusedPipeline, UVit2DModel
from models import GUIDANCE, PROMPT, STEPS, write_model
from models import SIZES as SMALL
from report import Row, compare, paired, row_of, write
from torch.nn import functional as F

from raymuse.models.uvit import UVit, UVitConfig
from raymuse.models.vqgan import Vqgan
from raymuse.pipeline import Pipeline
from raymuse.training.masked import MaskedLoss

PACKAGES = ("torch", "diffusers", "transformers")
TEXT = {"width": 768, "layers": 12, "heads": 12, "projection": 768, "patch_size": 32}
REAL: dict[str, dict[str, Any]] = {
    side: {
        "uvit": {"micro": (256, 1280), "downsample": side == "512", "upsample": side == "512"},
        "codes": 8192,
        "grid": int(side) // 16,
        "vqgan": [128, 256, 256, 512, 768],
        "latent": 64,
        "text": TEXT,
    }
    for side in ("256", "512")
}


@dataclass(frozen=True)
class Work:
    """GFLOP a picture, two a multiply-add (docs/scale.md)."""

    train: float
    encode: float
    draw: float


WORK = {"256": Work(656.8, 216.3, 5620), "512": Work(698.5, 865.3, 7380)}
DRAWN = {"256": (1, 8, 64, 256), "512": (1, 8, 64)}
TRAINED = ENCODED = 64
SHARE = 0.5


@dataclass(frozen=True)
class Bench:
    """One model folder on one device.

    Attributes:
        peak: GFLOP/s that the device multiplies.
    """

    side: str
    folder: str
    device: str
    peak: float

    def share(self, name: str, rate: float, work: float) -> Row:
        rates = {"ours": [rate], "limit": [self.peak / work]}
        return row_of(f"{name}, share of the limit", "limit", rates, SHARE, "pictures/s", PACKAGES)

    def timed(self, work: Callable[[], object], pictures: int, least: float = 4.0) -> float:
        """Pictures a second, after a call that does not count."""
        work()
        self.wait()
        began, count = time.perf_counter(), 0
        while (seconds := time.perf_counter() - began) < least:
            work()
            self.wait()
            count += pictures
        return count / seconds

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> str:
        """The most since it was last asked."""
        if self.device != "cuda":
            return "not measured"
        most = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return f"{most:.1f} GiB"


def main(words: list[str]) -> None:
    device = "cpu" if "cpu" in words else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "Error: make bench-gpu needs a CUDA GPU, and PyTorch finds none. `make bench` is for CPUs.",
            file=sys.stderr,
        )
        sys.exit(2)
    parts = {"generate": generate, "train": train, "encode": encode}
    wanted = [name for name in parts if name in words] or list(parts)
    sizes = {"demo": SMALL["demo"]} if device == "cpu" else REAL
    root, rows = Path(tempfile.mkdtemp(prefix="bench-")), list[Row]()
    try:
        peak = measured_peak(device)
        for side, size in sizes.items():
            bench = Bench(side, write_model(root / side, **size), device, peak)
            for name in wanted:
                rows += parts[name](bench)
    finally:
        shutil.rmtree(root)
    write("gpu", rows, keep=len(wanted) < len(parts))


@torch.no_grad()
def measured_peak(device: str) -> float:
    """GFLOP/s of a large product in bf16."""
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * side**3 / (time.perf_counter() - began) / 1e9)
    print(f"the device multiplies {max(rates[2:]) / 1000:.2f} TFLOP/s in bf16")
    return max(rates[2:])


def generate(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    theirs = AmusedPipeline.from_pretrained(bench.folder, torch_dtype=torch.bfloat16).to(bench.device)
    theirs.set_progress_bar_config(disable=True)
    plain, how = (
        theirs.transformer,
        {
            "num_inference_steps": STEPS,
            "guidance_scale": GUIDANCE,
            "output_type": "np",
        },
    )
    for batch in DRAWN.get(bench.side, (2,)):
        loaded = Pipeline.load(bench.folder, device=bench.device, batch_size=batch)
        loaded = replace(loaded, base=loaded.base.to(torch.bfloat16))
        for way in ("eager", "compiled"):
            ours = loaded if way == "eager" else loaded.compiled()
            theirs.transformer = plain if way == "eager" else torch.compile(plain)
            row = compare(
                f"{bench.side}, batch {batch}, both {way}",
                "diffusers-amused",
                lambda ours=ours, batch=batch: bench.timed(lambda: ours([PROMPT] * batch, seeds=range(batch)), batch),
                lambda batch=batch: bench.timed(
                    lambda: theirs([PROMPT] * batch, **how),
                    batch,
                ),
                goal=4.0 if way == "eager" else 1.3, unit="pictures/s", packages=PACKAGES,
            )  # fmt: skip
            print(f"  {row.name}: {1000 * batch / row.ours:.1f} ms a batch, peak {bench.memory()}")
            rows += [row, bench.share(row.name, row.ours, _work(bench).draw)]
            if bench.device == "cpu":
                return rows
    return rows


def train(bench: Bench) -> list[Row]:
    """Steps on made token batches, states at hand: ours and a bare loop around diffusers' network."""
    batch = made_batch(bench, TRAINED if bench.device == "cuda" else 2)
    config = UVitConfig.from_diffusers(UVit2DModel.load_config(f"{bench.folder}/transformer"))
    ours = MaskedLoss(UVit(config), 0.0, "bf16").to(bench.device).train()
    theirs = UVit2DModel.from_pretrained(f"{bench.folder}/transformer").to(bench.device).train()

    def our_loss() -> torch.Tensor:
        loss, _ = ours(batch)
        return loss / batch["mask"].sum()

    def their_loss() -> torch.Tensor:
        with torch.autocast(bench.device, torch.bfloat16):
            logits = theirs(batch["ids"], batch["states"], batch["pooled"], batch["micro"])
        targets = torch.where(batch["mask"], batch["targets"], -100)
        return F.cross_entropy(logits.float(), targets)

    contenders = {"ours": stepper(ours, our_loss), "bare-pytorch": stepper(theirs, their_loss)}
    size = len(batch["ids"])
    rates = paired(
        f"{bench.side}, training",
        {name: lambda step=step: bench.timed(step, size) for name, step in contenders.items()},
        "samples/s",
    )
    print(f"  {bench.side}, batch {size}: peak {bench.memory()} with both networks and their optimizers")
    name = f"{bench.side}, training in bf16, batch {size}"
    ours_rate = statistics.median(rates["ours"])
    return [
        row_of(f"{name}, around diffusers' network", "bare-pytorch", rates, 1.0, "samples/s", PACKAGES),
        bench.share(name, ours_rate, _work(bench).train),
    ]


def stepper(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def made_batch(bench: Bench, size: int) -> dict[str, torch.Tensor]:
    config = UVitConfig.from_diffusers(UVit2DModel.load_config(f"{bench.folder}/transformer"))
    draw, grid = torch.Generator().manual_seed(0), (config.sample_size, config.sample_size)
    targets = torch.randint(0, config.codebook_size, (size, *grid), generator=draw)
    mask = torch.rand((size, *grid), generator=draw) < 0.64
    batch = {
        "ids": torch.where(mask, config.mask_id, targets), "targets": targets, "mask": mask,
        "real": torch.ones(size, dtype=torch.bool), "micro": torch.full((size, 5), 256.0),
        "states": torch.randn(size, 77, config.encoder_hidden_size, generator=draw),
        "pooled": torch.randn(size, config.cond_embed_dim, generator=draw),
    }  # fmt: skip
    return {name: tensor.to(bench.device) for name, tensor in batch.items()}


def encode(bench: Bench) -> list[Row]:
    """The VQGAN's encoder in bf16, pictures in the host's memory to ids there."""
    vqgan = Vqgan.load(bench.folder, bench.device, "bf16")
    size = ENCODED if bench.device == "cuda" else 2
    side = vqgan.factor * (REAL[bench.side]["grid"] if bench.side in REAL else 8)
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    rate = bench.timed(lambda: vqgan.encode(pixels), size)
    print(f"  {bench.side}, encoding {size} at a time: {rate:.1f} pictures/s, peak {bench.memory()}")
    return [bench.share(f"{bench.side}, VQGAN encoding in bf16, batch {size}", rate, _work(bench).encode)]


def _work(bench: Bench) -> Work:
    """The demo's sizes, which only check that the script runs, have no count."""
    return WORK.get(bench.side, Work(1.0, 1.0, 1.0))


if __name__ == "__main__":
    main(sys.argv[1:])
