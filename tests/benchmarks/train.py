"""`make bench-train`: ours on Ray Train and DeepSpeed, beside train_amused.py and beside a bare PyTorch loop.

`python tests/benchmarks/train.py train_amused.py [256|512|large ...]`, with the script of diffusers' examples/amused.

All start from one model folder, on the same pictures (captions are their names), batch and optimizer settings, and one
process of two threads. train_amused.py encodes pictures and captions in every step; ours trains from token shards, as
`raymuse pretokenize` made them; the bare loop has its batches ready. Sizes are small, in the real ones' proportions:
encoding a batch costs about a third of a train step at 256 and 1.3 times one at 512, which is measured and printed.
The bare loop's losses must be ours, step by step; train_amused.py draws other masks, so that its mean is compared.
"""

import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from models import write_model
from peers import Training, python_of, start, versions_of
from report import OF_WHAT, PROCESSOR, THREADS, Row, clock, paired, row_of, write

from raymuse.config.training import BaseConfig, OptimizerConfig
from raymuse.datasets import shapes

BATCH, LARGE, PICTURES, PAIRS, SIDE = 4, 16, 64, 5, {"256": 256, "512": 512}
STEPS = 4 if PROCESSOR else 12  # a turn
GOALS = {"256": 1.3, "512": 2.0}
OVERHEAD = 1 / 1.1  # of Ray and DeepSpeed: at most 10 %
EXACT_ROWS = (8, 2)
PACKAGES = ("torch", "ray", "deepspeed", "diffusers")
OPTIMIZER = OptimizerConfig(
    lr=3e-4, beta1=0.9, beta2=0.999, weight_decay=0.01, warmup_steps=1, schedule="constant", clip_norm=None
)
UVIT: dict[str, Any] = {
    "hidden_size": 208, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 572,
    "in_channels": 160, "block_out_channels": 160, "block_num_heads": 4, "num_res_blocks": 2,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    side: {
        "uvit": UVIT | {"downsample": side == "512", "upsample": side == "512"},
        "codes": 1024,
        "grid": SIDE[side] // 16,
        "vqgan": [16, 16, 32, 32, 48],
        "text": {"width": 96, "layers": 2, "heads": 4, "projection": 64, "patch_size": 8},
    }
    for side in SIDE
}
OURS = """
import sys
from contextlib import ExitStack
from raymuse.clusters.local import session
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import BaseConfig
from raymuse.stages.pretokenize import pretokenize
from raymuse.stages.train import train
from raymuse.tracking.run import Run

with ExitStack() as open:
    for attempt in range(8):  # Ray gives its own start 30 seconds, which a busy machine may not
        try:
            open.enter_context(session(num_cpus=4, object_store_gib=0.3, dashboard=False))
            break
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    pretokenize(PretokenizeConfig.model_validate_json(sys.argv[1]), Run.off())
    train(BaseConfig.model_validate_json(sys.argv[2]), Run.off())
"""


def main(script: str, wanted: list[str]) -> None:
    rows: list[Row] = []
    for name in wanted or [*SIDE, "large"]:
        root = Path(tempfile.mkdtemp(prefix="bench-"))
        try:
            rows += large_rows(root) if name == "large" else rows_of(script, name, root)
        finally:
            shutil.rmtree(root)
    write("train", rows, keep=bool(wanted))


def rows_of(script: str, side: str, root: Path) -> list[Row]:
    model, pictures = write_model(root / "model", **SIZES[side]), write_pictures(root / "pictures", SIDE[side])
    config = config_of(root, model, BATCH)
    starts = {
        "ours": lambda: start_ours(config, model, pictures, SIDE[side]),
        "bare-pytorch": lambda: start_bare(config),
        "train_amused": lambda: start_amused(script, model, pictures, SIDE[side], root / "amused"),
    }
    rates, losses = contest(side, starts, BATCH)
    bare = bare_row(f"{side}-shaped, batches of {BATCH}", rates, losses, BATCH)
    like_amuseds(losses)
    seconds = BATCH / statistics.median(rates["bare-pytorch"])
    print(f"{side}: encoding a batch takes {encoding_seconds(model, SIDE[side]) / seconds:.2f} of the bare loop's step")
    versions = versions_of("amused", ("torch", "diffusers", "accelerate", "transformers"))
    name = f"{side}-shaped, from token shards"
    return [row_of(name, "train_amused", rates, GOALS[side], f"samples/s{OF_WHAT}", PACKAGES, versions), bare]


def large_rows(root: Path) -> list[Row]:
    """Ours and the bare loop with larger batches: what DeepSpeed does once a step is the same, the step is not.

    And ours with exact sums beside sums as they come.
    """
    side = "256"
    model, pictures = write_model(root / "model", **SIZES[side]), write_pictures(root / "pictures", SIDE[side])
    config = config_of(root, model, LARGE)
    kinds = {f"exact, {rows} rows": exactly(config, rows) for rows in EXACT_ROWS}
    starts = {
        "ours": lambda: start_ours(config, model, pictures, SIDE[side]),
        "bare-pytorch": lambda: start_bare(config),
        **{kind: partial(start_ours, exact, model, pictures, SIDE[side]) for kind, exact in kinds.items()},
    }
    rates, losses = contest("large", starts, LARGE)
    name = f"{side}-shaped, batches of {LARGE}"
    return [bare_row(name, rates, losses, LARGE), *(exact_row(name, kind, rates, losses) for kind in kinds)]


def exactly(config: BaseConfig, rows: int) -> BaseConfig:
    """The same with gradients of so many rows at a time summed exactly."""
    return config.model_copy(update={"exact_rows": rows, "output": f"{config.output}-{rows}"})


def exact_row(name: str, kind: str, rates: dict[str, list[float]], losses: dict[str, dict[int, float]]) -> Row:
    ours, plain = losses[kind], losses["ours"]
    apart = max(abs(ours[step] - plain[step]) for step in sorted(ours.keys() & plain.keys()))
    print(f"losses of equal steps differ by {apart:.1e} at most between {kind} at a time, and sums as they come")
    assert apart < 1e-3, "exact sums do not train the same"
    both = {"ours": rates[kind], "sums as they come": rates["ours"]}
    return row_of(f"{name}, {kind} at a time", "sums as they come", both, 1.0, f"samples/s{OF_WHAT}", PACKAGES)


def config_of(root: Path, model: str, batch: int) -> BaseConfig:
    return BaseConfig(
        input=f"{root}/tokens", output=f"{root}/run", start_from=model, steps=10**6, batch_size=batch, workers=1,
        cpus_per_worker=THREADS, optimizer=OPTIMIZER, caption_dropout=0.0, log_every=1, sample_every=10**6,
        checkpoint={"every": 10**6}, zero={"stage": 1},
    )  # fmt: skip


def contest(
    name: str, starts: Mapping[str, Callable[[], Training]], batch: int
) -> tuple[dict[str, list[float]], dict[str, dict[int, float]]]:
    """Start each, and give them turns: their rates, samples/s, and their losses by step."""
    trainings: dict[str, Training] = {}
    try:
        for contender, begin in starts.items():
            trainings[contender] = begin()
            trainings[contender].turn(1)
        turns = {contender: rate(one, STEPS, batch) for contender, one in trainings.items()}
        rates = paired(name, turns, f"samples/s{OF_WHAT}", PAIRS)
    finally:
        for training in trainings.values():
            training.end()
    return rates, {contender: training.losses() for contender, training in trainings.items()}


def bare_row(name: str, rates: dict[str, list[float]], losses: dict[str, dict[int, float]], batch: int) -> Row:
    """Ours beside the bare loop, whose losses must be ours, step by step."""
    ours, bare = losses["ours"], losses["bare-pytorch"]
    both = sorted(ours.keys() & bare.keys())
    apart = max(abs(ours[step] - bare[step]) for step in both)
    print(f"losses of {len(both)} equal steps differ by {apart:.1e} at most between ours and the bare loop")
    assert apart < 1e-3, "ours and the bare loop do not train the same"
    seconds = batch / statistics.median(rates["bare-pytorch"])
    name = f"{name}, step of {seconds * 1000:.0f} ms, ZeRO-1"
    return row_of(name, "bare-pytorch", rates, OVERHEAD, f"samples/s{OF_WHAT}", PACKAGES)


def rate(training: Training, steps: int, batch: int) -> Callable[[], float]:
    return lambda: batch / training.turn(steps)


def start_ours(config: BaseConfig, model: str, pictures: str, side: int) -> Training:
    """Pre-tokenize, then train, in one Ray; the worker alone is suspended between turns."""
    from raymuse.config.pretokenize import PretokenizeConfig

    shards = PretokenizeConfig(
        input=pictures, output=config.input, vqgan=model, text_encoder=model, resolution=side, chunk_size=16
    )
    command = [sys.executable, "-c", OURS, shards.model_dump_json(), config.model_dump_json()]
    pattern = r"^step (?P<step>\d+)/\d+  loss (?P<loss>[\d.]+)"
    return start(command, f"(?m){pattern}", threads=THREADS, worker="RayTrainWorker")


def start_bare(config: BaseConfig) -> Training:
    command = [sys.executable, str(Path(__file__).with_name("bare_training.py")), config.model_dump_json()]
    return start(command, r"(?m)^step (?P<step>\d+) loss (?P<loss>[\d.]+)", threads=THREADS)


def start_amused(script: str, model: str, pictures: str, side: int, out: Path) -> Training:
    runner = str(Path(__file__).with_name("amused_peer.py").absolute())
    arguments = {
        "pretrained_model_name_or_path": model, "instance_data_dir": pictures, "output_dir": str(out),
        "train_batch_size": BATCH, "resolution": side, "max_train_steps": 10**6, "learning_rate": OPTIMIZER.lr,
        "lr_warmup_steps": 1, "adam_weight_decay": OPTIMIZER.weight_decay, "logging_steps": 1, "seed": 0,
        "validation_steps": 10**6, "checkpointing_steps": 10**6, "report_to": "all", "mixed_precision": "no",
    }  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    pattern = r"Step: (?P<step>\d+) Loss: (?P<loss>[\d.]+)"
    return start([python_of("amused"), runner, script, *words], pattern, threads=THREADS, peer=True)


def like_amuseds(losses: dict[str, dict[int, float]]) -> None:
    """train_amused.py hides other ids, so that its losses are ours on average."""
    ours, amused = losses["ours"], losses["train_amused"]
    last = min(max(ours), max(amused))
    means = [statistics.mean(of[step] for step in of if last // 2 <= step <= last) for of in (ours, amused)]
    print(f"mean loss of steps {last // 2} to {last}: ours {means[0]:.3f}, train_amused.py {means[1]:.3f}")
    assert abs(means[0] / means[1] - 1) < 0.1, "ours and train_amused.py do not train the same"


@torch.no_grad()
def encoding_seconds(model: str, side: int) -> float:
    """What encoding a batch costs: the quickest of three."""
    torch.set_num_threads(THREADS)
    vqgan = VQModel.from_pretrained(model, subfolder="vqvae").eval()
    pixels = torch.rand(BATCH, 3, side, side)
    seconds = []
    for _ in range(4):
        began = clock()
        vqgan.quantize(vqgan.encode(pixels).latents)
        seconds.append(clock() - began)
    return min(seconds[1:])


def write_pictures(folder: Path, side: int) -> str:
    """Pictures of `side` pixels, named after their captions, as train_amused.py wants them."""
    folder.mkdir()
    for number, one in enumerate(shapes.samples(10 * PICTURES, 0, side, held_out=False)):
        if len(list(folder.iterdir())) == PICTURES:
            break
        one.image.save(folder / f"{one.caption}.png")
        assert number < 10 * PICTURES - 1
    return str(folder)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).exists():
        sys.exit("usage: train.py TRAIN_AMUSED_SCRIPT [256|512|large ...] (`make bench-train` fetches the script)")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # its trainings end with it
    main(sys.argv[1], sys.argv[2:])
