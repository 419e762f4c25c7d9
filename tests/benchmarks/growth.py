"""`make bench-growth`: what 1 to 32 times the work costs, and what a second worker brings.

`python tests/benchmarks/growth.py [pretokenize|data|generate|scaling ...]`, else all. Growth: seconds of the whole call
for 1, 2, 4, ... 32 times the work in one Ray; a line is fitted (fixed seconds, seconds a unit), and the slope of the
logarithms is taken from 4 times the work on: 1 is linear, less is fixed cost, more is work that grows faster than its
input. A row's ratio is that of the rates at 32 and at 4 times. Scaling: rate with two workers over twice the rate
with one, each worker with one core; more where the machine has the cores for them.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from load import BATCH, CODES, ROWS, write_text_encoder, write_tokens
from models import PROMPT, SIZES, write_model
from pretokenize import config_of, write_models, write_pictures
from report import Row, line, paired, row_of, write

from raymuse.clusters.local import session
from raymuse.config.generate import GenerateConfig
from raymuse.config.training import BaseConfig, LoraConfig
from raymuse.stages.generate import generate
from raymuse.stages.pretokenize import pretokenize
from raymuse.stages.train import train
from raymuse.tracking.run import Run
from raymuse.training.tokens import TokenStream

WORK = (1, 2, 4, 8, 16, 32)
PICTURES, PROMPTS, STEPS = 100, 16, 4  # a unit of work: pictures to encode, prompts to draw in so many steps
LINEAR, SCALED = 0.9, 0.8  # goals: rate at 32 over that at 4 times the work; efficiency of a second worker
PACKAGES = ("ray", "torch", "pyarrow")
WORKERS = (1, 2, *((4,) if (os.cpu_count() or 1) >= 4 else ()))


def main(words: list[str]) -> None:
    wanted = words or ["data", "pretokenize", "generate", "scaling"]
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    rows: list[Row] = []
    try:
        if "data" in wanted:
            rows.append(data_growth(root / "data"))
        if set(wanted) - {"data"}:
            with session(num_cpus=2 * max(WORKERS), object_store_gib=0.5, dashboard=False):
                shards = write_pictures(root / "shards", max(WORK), PICTURES, (96, 64))
                write_models(root / "encoders", shards)
                model = write_model(root / "model", **SIZES["demo"])
                for name, rows_of in (("pretokenize", pretokenize_growth), ("generate", generate_growth)):
                    if name in wanted:
                        rows.append(rows_of(root, model))
                if "scaling" in wanted:
                    rows += scaling(root, model)
    finally:
        shutil.rmtree(root)
    write("growth", rows, keep=bool(words))


# --- growth


def data_growth(root: Path) -> Row:
    """An epoch of token shards, one part a unit of work; seconds of processor time, which other work does not touch."""
    torch.set_num_threads(1)
    root.mkdir()
    write_text_encoder(root)
    seconds: dict[int, float] = {}
    for work in WORK:
        folder = root / f"tokens-{work}"
        write_tokens(folder, parts=work)
        stream = TokenStream(data_config(root, folder), "cpu", text_trained=True)
        runs = []
        for _ in range(5):
            began = time.process_time()
            for step in range(work * ROWS // BATCH):
                stream.batch(np.arange(step * BATCH, (step + 1) * BATCH), np.ones(BATCH, np.float32), CODES)
            runs.append(time.process_time() - began)
            stream.store.part.cache_clear()
        seconds[work] = statistics.median(runs)
        shutil.rmtree(folder)
    return growth_row("training data, an epoch", seconds, ROWS, "samples/s of one core")


def data_config(root: Path, tokens: Path) -> BaseConfig:
    return BaseConfig(
        input=str(tokens), output=f"{root}/none", steps=1, text_encoder=f"{root}/clip", start_from="nothing",
        lora=LoraConfig(text_targets=("q_proj",)),
    )  # fmt: skip


def pretokenize_growth(root: Path, _: str) -> Row:
    def run(work: int) -> float:
        shards = f"{root}/shards/{{00000..{work - 1:05d}}}.tar" if work > 1 else f"{root}/shards/00000.tar"
        return whole(lambda: pretokenize(config_of(shards, f"{root}/encoders", f"{root}/tokens"), Run.off()), root)

    run(1)  # Ray's workers start
    return growth_row("pre-tokenize", {work: run(work) for work in WORK}, PICTURES, "pictures/s")


def generate_growth(root: Path, model: str) -> Row:
    def run(work: int) -> float:
        return whole(lambda: generate(generate_config(root, model, work), Run.off()), root)

    run(1)
    return growth_row("batch generation", {work: run(work) for work in WORK}, PROMPTS, "pictures/s")


def generate_config(root: Path, model: str, work: int) -> GenerateConfig:
    prompts = root / "prompts.txt"
    prompts.write_text("".join(f"{PROMPT}\n" for _ in range(work * PROMPTS)))
    return GenerateConfig(
        model=model, prompts=str(prompts), output=f"{root}/images", steps=STEPS, engine="actors", cpus_per_replica=1,
        pictures_per_part=PROMPTS, batch_size=PROMPTS,
    )  # fmt: skip


def whole(work: Callable[[], object], root: Path) -> float:
    """Seconds of a stage into a fresh output."""
    for output in ("tokens", "images"):
        shutil.rmtree(root / output, ignore_errors=True)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def growth_row(name: str, seconds: Mapping[int, float], unit_size: int, unit: str) -> Row:
    fixed, each, slope = line(seconds)
    told = ", ".join(f"{work} times {took:.1f} s" for work, took in seconds.items())
    print(f"{name}: {told}; {fixed:.1f} s and {each:.3f} s a unit of {unit_size}; slope {slope:.2f}", flush=True)
    most, few = max(seconds), 4
    rates = {"ours": [most * unit_size / seconds[most]], "itself": [few * unit_size / seconds[few]]}
    row = row_of(f"{name}, 32 beside 4 times the work", "itself", rates, LINEAR, unit, PACKAGES)
    return replace(row, name=f"{row.name} (slope {slope:.2f})")


# --- scaling


def scaling(root: Path, model: str) -> list[Row]:
    """Each with one worker and with more, in turn, on the same work."""
    shards = f"{root}/shards/{{00000..00015}}.tar"
    measured: dict[str, tuple[str, Callable[[int], float]]] = {
        "pre-tokenize": ("pictures/s", lambda workers: pretokenize_rate(root, shards, workers)),
        "batch generation": ("pictures/s", lambda workers: generate_rate(root, model, workers)),
        "training": ("samples/s", lambda workers: train_rate(root, model, workers)),
    }
    rows = []
    for name, (unit, rate) in measured.items():
        rate(1)
        for workers in WORKERS[1:]:
            contenders = {
                "ours": lambda rate=rate, workers=workers: rate(workers),
                "itself": lambda rate=rate, workers=workers: workers * rate(1),
            }
            rates = paired(f"{name}, {workers} workers", contenders, unit, pairs=3)
            rows.append(
                row_of(
                    f"{name}, {workers} workers beside one, times {workers}", "itself", rates, SCALED, unit, PACKAGES
                )
            )
    return rows


def pretokenize_rate(root: Path, shards: str, workers: int) -> float:
    config = config_of(shards, f"{root}/encoders", f"{root}/tokens").model_copy(
        update={"encoders": workers, "min_encoders": workers}
    )
    return 16 * PICTURES / whole(lambda: pretokenize(config, Run.off()), root)


def generate_rate(root: Path, model: str, workers: int) -> float:
    config = generate_config(root, model, 16).model_copy(update={"replicas": workers})
    return 16 * PROMPTS / whole(lambda: generate(config, Run.off()), root)


def train_rate(root: Path, model: str, workers: int) -> float:
    """Of the last of three intervals, as the training says it."""
    tokens, output = root / "train-tokens", root / "train"
    if not tokens.exists():
        pretokenize(config_of(f"{root}/shards/00000.tar", model, str(tokens), resolution=32), Run.off())
    shutil.rmtree(output, ignore_errors=True)
    config = BaseConfig(
        input=str(tokens), output=str(output), start_from=model, steps=60, batch_size=32, workers=workers, log_every=20,
        zero={"stage": 1}, checkpoint={"every": 10**6}, sample_every=10**6,
    )  # fmt: skip
    train(config, Run.off())
    said = (output / "progress.log").read_text().splitlines()[-1]
    return float(said.partition(" samples/s")[0].rpartition(" ")[2])


if __name__ == "__main__":
    main(sys.argv[1:])
