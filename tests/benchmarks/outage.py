"""`make bench-outage`: steps of a training whose MLflow server is away or refuses it, beside one whose server is up.

A tiny transformer on one thread, every step logged, in turn: a process of its own each, so that nothing unsent of one
is sent by another. Steps/s are those of the median step. Processor seconds are the whole process's, with the thread
that sends among them, over all steps but the first: on a machine with other work these are what to look at.
"""

import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from report import paired, row_of, write

sys.path.append(str(Path(__file__).parents[1]))

import tiny
from faulty import Faulty
from raymuse.config.training import BaseConfig
from raymuse.serving.deploy import free_port
from raymuse.tracking.run import open_run
from raymuse.tracking.server import Server
from raymuse.training.build import build_engine, build_task
from raymuse.training.loop import Loop

STEPS, FIRST, PAIRS = 200, 20, 5
ALLOWED = 1 / 1.05  # an outage may cost 5 % of a step
PACKAGES = ("torch", "mlflow")
UP = "server-up"


@dataclass(frozen=True)
class Trained:
    """One training.

    Attributes:
        step: seconds of the median step.
        processor: processor seconds a step.
        loss: mean of all steps.
        arrived: whether the server has all that was logged.
    """

    step: float
    processor: float
    loss: float | None
    arrived: bool


def train(config: BaseConfig, uri: str, spool: str) -> Trained:
    """The training of a process."""
    torch.set_num_threads(1)
    marks: list[tuple[float, float]] = []
    run = open_run(uri, "outage", "training", spool=Path(spool), patience=60)
    task = build_task(config)
    loop = Loop(
        *(config, task, build_engine(config, task), run, lambda *_: None, lambda line: None),
        next_step=lambda: marks.append((time.perf_counter(), time.process_time())),
    )
    loop.fit()
    marks = marks[FIRST - 1 :]
    seconds = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(marks)]
    processor = (marks[-1][1] - marks[0][1]) / len(seconds)
    return Trained(statistics.median(seconds), processor, loop.last_loss, run.finish(timeout=5))


class Contender:
    """Trains anew at each call, with its server."""

    def __init__(self, root: Path, name: str, uri: str, tokens: str) -> None:
        self.root, self.name, self.uri, self.tokens = root, name, uri, tokens
        self.trained: list[Trained] = []

    def __call__(self) -> float:
        """Steps a second."""
        place = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.root))
        config = tiny.base_config(
            *(place, self.tokens),
            ids="image_ids", steps=STEPS, log_every=1, sample_every=10**6,
        )  # fmt: skip
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "mlflow"])
        with ProcessPoolExecutor(1, context) as alone:
            self.trained.append(alone.submit(train, config, self.uri, str(place / "spool")).result())
        assert self.trained[-1].arrived is (self.name == UP)
        return 1 / self.trained[-1].step


def main() -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shards = tiny.write_shards(root / "shards", count=480)
        tokens = tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root / "encoders", shards))
        with Server.start(root / "mlflow", timeout=600) as server, Faulty(server.port) as refusing:
            refusing.mood = "refused"
            places = {UP: server.uri, "away": f"http://127.0.0.1:{free_port('127.0.0.1')}", "refusing": refusing.uri}
            contenders = {name: Contender(root, name, uri, tokens) for name, uri in places.items()}
            contenders[UP]()  # what only a first training takes time for
            contenders[UP].trained.clear()
            steps = paired("step", contenders, "steps/s", PAIRS)
    assert len({one.loss for contender in contenders.values() for one in contender.trained}) == 1, "not the same work"
    processor = {name: [1 / one.processor for one in contender.trained] for name, contender in contenders.items()}
    rows = []
    for name in ("away", "refusing"):
        for rates, unit in ((steps, "steps/s"), (processor, "steps/s of a core")):
            rows.append(row_of(f"MLflow {name}", UP, against(rates, name), ALLOWED, unit, PACKAGES))
    write("outage", rows)


def against(rates: Mapping[str, list[float]], name: str) -> dict[str, list[float]]:
    return {"ours": rates[name], UP: rates[UP]}


if __name__ == "__main__":
    main()
