"""`python tests/benchmarks/curve.py WORKDIR`: what every minute of a flow's training bought, by the judge.

WORKDIR is that of a finished flow on shapes whose trainings kept their checkpoints (`raymuse demo --recipe demo-full`).
Each checkpoint of the VQGAN (round trips, the ceiling), of the base and of the super-resolution (which enlarges what
the finished base drew) is judged on the held-out prompts. Prints a table, adds the numbers to the flow's run in MLflow
(`curve.base.one_object`, at the step of the checkpoint), and draws WORKDIR/curve.png.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raymuse.datasets.judge import judge
from raymuse.datasets.scenes import parse
from raymuse.encoding.pictures import crop, decode, downscale
from raymuse.pipeline import Pipeline
from raymuse.storage import checkpoint as store
from raymuse.storage.images import list_shards
from raymuse.storage.picture_index import PictureIndex
from raymuse.tracking.run import Run, open_run
from raymuse.tracking.server import Server

Pictures = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Point:
    """Shares of captions drawn right by what a training had learned."""

    curve: str
    step: int
    minutes: float
    one_object: float
    two_objects: float


def main(workdir: Path) -> None:
    torch.set_num_threads(2)
    pipeline = Pipeline.load(str(workdir / "model"), batch_size=16)
    index = PictureIndex(list_shards(str(workdir / "data/test")))
    truth = [crop(decode(index[number].data), pipeline.settings.size).pixels for number in range(len(index))]
    prompts = [json.loads(line) for line in (workdir / "data/prompts.jsonl").read_text().splitlines()]
    captions = [prompt["prompt"] for prompt in prompts]
    assert [index.key(number) for number in range(len(index))] == [prompt["key"] for prompt in prompts]
    points: list[Point] = []
    print("| curve | step | minutes | one object | two objects |\n|---|---|---|---|---|")
    for one in chain(ceilings(workdir, pipeline, truth, captions), drawings(workdir, pipeline, captions)):
        shares = f"{one.one_object:.1%} | {one.two_objects:.1%}"
        print(f"| {one.curve} | {one.step} | {one.minutes:.1f} | {shares} |", flush=True)
        points.append(one)
    track(workdir, points)
    draw(points, workdir / "curve.png")


def ceilings(workdir: Path, pipeline: Pipeline, truth: Pictures, captions: Sequence[str]) -> Iterator[Point]:
    """Round trips of the true pictures, at the base's and at the final size."""
    small = [downscale(picture, pipeline.settings.base_size) for picture in truth]
    vqgan = pipeline.vqgan

    def trip(pictures: Pictures) -> Pictures:
        return [picture for batch in batched(pictures) for picture in vqgan.decode(vqgan.encode(np.stack(batch)))]

    for step, minutes in checkpoints(workdir / "vqgan", vqgan.network):
        yield point(f"VQGAN, {pipeline.settings.size} px", step, minutes, trip(truth), captions)
        yield point(f"VQGAN, {pipeline.settings.base_size} px", step, minutes, trip(small), captions)


def drawings(workdir: Path, pipeline: Pipeline, captions: Sequence[str]) -> Iterator[Point]:
    """Pictures by the base of every checkpoint, then by the cascade of every checkpoint and the finished base."""
    seeds = range(len(captions))
    alone = replace(pipeline, superres=None, superres_vqgan=None)
    for step, minutes in checkpoints(workdir / "base", pipeline.base):
        yield point("base", step, minutes, alone(captions, seeds=seeds).pixels, captions)
    assert pipeline.superres is not None
    for step, minutes in checkpoints(workdir / "superres", pipeline.superres):
        yield point("cascade", step, minutes, pipeline(captions, seeds=seeds).pixels, captions)


def checkpoints(training: Path, network: nn.Module) -> Iterator[tuple[int, float]]:
    """Put each checkpoint's averaged weights into the network; its step, and its minutes since the training began."""
    began = (training / "_manifest/config.json").stat().st_mtime
    for folder in sorted(training.glob("step-*")):
        checkpoint, problem = store.read(folder)
        assert checkpoint is not None, f"{folder}: {problem}"
        tensors = checkpoint.tensors()
        average = "ema" if any(name.startswith("ema/") for name in tensors) else "weight"
        prefix = f"{average}/network."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if "extra/codes" in tensors:
            weights["quantize.embedding.weight"] = tensors["extra/codes"]
        network.load_state_dict(weights)
        yield checkpoint.step, ((folder / "checkpoint.json").stat().st_mtime - began) / 60


def point(curve: str, step: int, minutes: float, pictures: Pictures, captions: Sequence[str]) -> Point:
    right: dict[int, list[bool]] = defaultdict(list)
    for picture, caption in zip(pictures, captions, strict=True):
        right[len(parse(caption).things)].append(judge(picture, caption).correct)
    return Point(curve, step, minutes, float(np.mean(right[1])), float(np.mean(right[2])))


def batched(pictures: Pictures, size: int = 16) -> Iterator[Pictures]:
    return (pictures[start : start + size] for start in range(0, len(pictures), size))


def track(workdir: Path, points: Sequence[Point]) -> None:
    """Into the flow's own run."""
    record = json.loads((workdir / "flow.json").read_text())
    with Server.start(workdir / "mlflow") as server:
        run: Run = open_run(
            server.uri, workdir.name, "flow", resume=record["runs"]["flow"], spool=workdir / "mlflow/spool"
        )
        for one in points:
            curve = f"curve.{one.curve.replace(', ', '_').replace(' ', '_')}"
            values = {"one_object": one.one_object, "two_objects": one.two_objects, "minutes": one.minutes}
            run.metrics({f"{curve}.{key}": value for key, value in values.items()}, one.step)
        assert run.finish()


def draw(points: Sequence[Point], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    kinds: list[tuple[str, Callable[[Point], float]]] = [
        ("one object", lambda one: one.one_object),
        ("two objects", lambda one: one.two_objects),
    ]
    for panel, (title, share) in zip(panels, kinds, strict=True):
        for curve in dict.fromkeys(one.curve for one in points):
            line = [one for one in points if one.curve == curve]
            panel.plot([one.minutes for one in line], [100 * share(one) for one in line], marker="o", label=curve)
        panel.set(title=title, xlabel="minutes of that part's training", ylim=(0, 102))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("held-out captions right, %")
    panels[1].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
