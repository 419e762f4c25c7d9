"""One training, five engines: plain in one process, and DeepSpeed at ZeRO 0 to 3 (and plain) on two, all alike.

With every optimizer, Muon having the three matrices of the toy; those that need parameters whole at ZeRO 0 alone.
"""

import math
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from raymuse.config.training import WHOLE, OptimizerConfig, OptimizerName
from raymuse.training.ema import Ema
from raymuse.training.engine import Engine, PlainEngine, full_weights, global_sum, rank_and_world
from raymuse.training.optimizers import build_optimizer, learning_rate_scale

ROWS, STEPS, HALF, MICRO = 8, 20, 10, 2
WORDS = 15_001  # ZeRO-3 keeps parameters of fewer than 100,000 numbers whole on every rank: one must be larger
HAS_8BIT = find_spec("bitsandbytes") is not None  # the machine of the tests may have none: then the rest is shown
NAMES = [name for name in get_args(OptimizerName) if name != "adamw-8bit" or HAS_8BIT]
CONFIGS = {name: OptimizerConfig(name=name, lr=1e-3 if name == "lion" else 1e-2, clip_norm=0.5) for name in NAMES}
TOLERANCE = 1e-5  # Muon magnifies rounding up to 3.4445 ** 5 times, where a gradient is nearly of lower rank
COMPILER = "torch._inductor.lowering"  # what takes long to import of it
ENGINES = ("plain", "0", "1", "2", "3")
OFFLOADED = " in the CPU's memory"
CELLS = [(f"{stage}{OFFLOADED}", "adamw") for stage in (1, 2)]
CELLS += [(kind, name) for kind in ENGINES for name in NAMES if name not in WHOLE or kind in ("plain", "0")]


class Toy(nn.Module):
    """A loss over rows; sizes that two ranks do not divide, an embedding, one number (DeepSpeed takes no scalars)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, 7)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 5), nn.LayerNorm(5))
        self.head = nn.Linear(5, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.head(self.body(self.embedding(batch["ids"]))) * self.scale * self.frozen - batch["wanted"]
        return error.square().sum(), {"rows": torch.tensor(float(len(error)))}


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    ema: dict[str, Tensor]
    updates: int


@dataclass(frozen=True)
class Trained:
    """A training's trace, its state half way and at the end, and its end when resumed from half way.

    Then its state after a step in which the last rank's gradients were no numbers, and the norm of it and of the next.
    """

    losses: list[float]
    norms: list[float]
    half: State
    end: State
    resumed: State
    poisoned: State
    poisoned_norm: float
    norm_after: float


SCALE = 2.0**12


def scaled(kind: str) -> list[State]:
    """Half way with a factor on the loss, as fp16 needs one; and after a step that it made too large."""
    engine = make_engine(kind)
    ema = Ema(engine, 0.9)
    engine.loss_scale = SCALE
    run_steps(engine, ema, 0, HALF)
    half = read_state(engine, ema)
    engine.loss_scale = 2.0**127
    first, second = micro_batches(0)
    for batch in (first, second):
        engine.backward(engine.forward(batch)[0] / ROWS)
    assert not math.isfinite(engine.step(1.0))
    return [half, read_state(engine, ema)]


def make_engine(kind: str, optimizer: str = "adamw") -> Engine:
    config = CONFIGS[optimizer]
    if kind == "plain":
        return PlainEngine(Toy(), config)
    from raymuse.training.zero import DeepSpeedEngine

    rows = ROWS // rank_and_world()[1]
    stage, offload = int(kind[0]), kind.endswith(OFFLOADED)
    sizes = {"micro_batch": rows // MICRO, "accumulation": MICRO}
    return DeepSpeedEngine(Toy(), config, zero_stage=stage, offload=offload, **sizes)


def micro_batches(step: int) -> list[dict[str, Tensor]]:
    """This rank's rows of the step's batch, in two halves."""
    draw = torch.Generator().manual_seed(100 + step)
    ids, wanted = torch.randint(WORDS, (ROWS,), generator=draw), torch.randn(ROWS, 3, generator=draw)
    rank, world = rank_and_world()
    mine = torch.arange(ROWS).view(world, MICRO, -1)[rank]
    return [{"ids": ids[rows], "wanted": wanted[rows]} for rows in mine]


def run_steps(engine: Engine, ema: Ema, first: int, last: int) -> list[tuple[float, float]]:
    trace = []
    for step in range(first, last):
        total = torch.zeros(())
        for batch in micro_batches(step):
            loss, metrics = engine.forward(batch)
            assert float(metrics["rows"]) == len(batch["ids"])
            engine.backward(loss / ROWS)
            total += loss.detach() / ROWS
        norm = engine.step(learning_rate_scale(step, STEPS, OptimizerConfig(warmup_steps=5)))
        ema.update()
        trace.append((float(global_sum(total)), norm))
    return trace


def read_state(engine: Engine, ema: Ema) -> State:
    """All of it, each by itself; read together, some numbers at a time, it is the same."""
    names = list(full_weights(engine))
    tensors = {f"weight/{name}": engine.read(name).clone() for name in names}
    tensors |= {f"{m}/{name}": engine.read(name, m).clone() for name in names for m in engine.moments(name)}
    seen: set[str] = set()
    kinds = {key.partition("/")[0] for key in tensors}
    with pytest.MonkeyPatch.context() as patch:
        if not isinstance(engine, PlainEngine):
            patch.setattr("raymuse.training.zero.GATHERED", 20)
        for kind in sorted(kinds):
            for name, value in engine.each(None if kind == "weight" else kind):
                assert torch.equal(value, tensors[f"{kind}/{name}"])
                seen.add(f"{kind}/{name}")
    assert seen == tensors.keys()
    return State(tensors, ema.weights(), engine.updates())


def restore(engine: Engine, ema: Ema, state: State) -> None:
    ema.restore(state.ema, state.updates)
    for key, value in state.tensors.items():
        kind, _, name = key.partition("/")
        engine.write(name, value, None if kind == "weight" else kind)
    engine.set_updates(state.updates)
    engine.publish()


def train(kind: str, optimizer: str) -> Trained:
    engine = make_engine(kind, optimizer)
    ema = Ema(engine, 0.9)
    before = full_weights(engine)
    assert all(torch.equal(value, Toy().state_dict()[name]) for name, value in before.items())
    trace = run_steps(engine, ema, 0, HALF)
    half = read_state(engine, ema)
    trace += run_steps(engine, ema, HALF, STEPS)
    losses, norms = zip(*trace, strict=True)
    end = read_state(engine, ema)
    poisoned_norm = poisoned_step(engine)
    poisoned = read_state(engine, ema)
    ((_, norm_after),) = run_steps(engine, ema, 0, 1)
    return Trained(
        list(losses), list(norms), half, end, resume(kind, optimizer, half), poisoned, poisoned_norm, norm_after
    )


def poisoned_step(engine: Engine) -> float:
    """The norm of a step with one row of the last rank's second half made infinite."""
    first, second = micro_batches(0)
    if engine.rank == engine.world - 1:
        second["wanted"][0] = float("inf")
    for batch in (first, second):
        engine.backward(engine.forward(batch)[0] / ROWS)
    return engine.step(1.0)


def resume(kind: str, optimizer: str, half: State) -> State:
    """The end of a training that goes on from half way."""
    engine = make_engine(kind, optimizer)
    ema = Ema(engine, 0.9)
    restore(engine, ema, half)
    run_steps(engine, ema, HALF, STEPS)
    return read_state(engine, ema)


def train_all() -> dict[str, Any]:
    assert shutil.which("g++") is shutil.which("ninja") is shutil.which("cc") is None
    trained: dict[str, Any] = {f"{kind} {optimizer}": train(kind, optimizer) for kind, optimizer in CELLS}
    imported = {"compiler": COMPILER in sys.modules}
    return {**trained, **{f"{kind} scaled": scaled(kind) for kind in ENGINES}, **imported}


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    torch.set_num_threads(1)
    return {optimizer: train("plain", optimizer) for optimizer in CONFIGS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_all, 2, tmp_path_factory.mktemp("engines"))


def close(ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == wanted.keys()
    worst = max(float((ours[name] - value).abs().max()) for name, value in wanted.items())
    assert worst <= tolerance, worst


def identical(ours: State, wanted: State) -> None:
    close(ours.tensors, wanted.tensors, 0)
    close(ours.ema, wanted.ema, 0)
    assert ours.updates == wanted.updates


all_optimizers = pytest.mark.parametrize("optimizer", CONFIGS)
all_cells = pytest.mark.parametrize(("kind", "optimizer"), CELLS)


@all_optimizers
def test_a_plain_resume_is_bit_identical(optimizer: str, alone: dict[str, Trained]) -> None:
    trained = alone[optimizer]
    identical(trained.resumed, trained.end)
    assert (trained.half.updates, trained.end.updates) == (HALF, STEPS)
    assert trained.losses[-1] < trained.losses[0]


@all_cells
def test_two_processes_train_as_one_does(
    kind: str, optimizer: str, alone: dict[str, Trained], pair: list[dict[str, Trained]]
) -> None:
    ours, wanted = pair[0][f"{kind} {optimizer}"], alone[optimizer]
    assert ours.losses == pytest.approx(wanted.losses, abs=TOLERANCE)
    assert ours.norms == pytest.approx(wanted.norms, rel=10 * TOLERANCE)
    close(ours.half.tensors, wanted.half.tensors, TOLERANCE)
    close(ours.end.tensors, wanted.end.tensors, TOLERANCE)


@all_cells
def test_the_average_of_two_processes_is_that_of_one(
    kind: str, optimizer: str, alone: dict[str, Trained], pair: list[dict[str, Trained]]
) -> None:
    ours, wanted = pair[0][f"{kind} {optimizer}"], alone[optimizer]
    close(ours.half.ema, wanted.half.ema, TOLERANCE)
    close(ours.end.ema, wanted.end.ema, TOLERANCE)


@all_cells
def test_a_resume_on_two_processes_is_bit_identical(kind: str, optimizer: str, pair: list[dict[str, Trained]]) -> None:
    for rank in pair:
        identical(rank[f"{kind} {optimizer}"].resumed, rank[f"{kind} {optimizer}"].end)


@all_cells
def test_one_process_goes_on_where_two_stopped(
    kind: str, optimizer: str, alone: dict[str, Trained], pair: list[dict[str, Trained]]
) -> None:
    ended = resume("plain", optimizer, pair[0][f"{kind} {optimizer}"].half)
    close(ended.tensors, alone[optimizer].end.tensors, TOLERANCE)


@all_cells
def test_every_rank_reads_the_same_full_state(kind: str, optimizer: str, pair: list[dict[str, Trained]]) -> None:
    identical(pair[0][f"{kind} {optimizer}"].end, pair[1][f"{kind} {optimizer}"].end)


@all_cells
def test_gradients_that_are_not_finite_change_nothing(
    kind: str, optimizer: str, pair: list[dict[str, Trained]]
) -> None:
    for rank in pair:
        trained = rank[f"{kind} {optimizer}"]
        assert not math.isfinite(trained.poisoned_norm)
        identical(trained.poisoned, trained.end)
        assert math.isfinite(trained.norm_after)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_factor_on_the_loss_changes_nothing_but_what_overflows(
    kind: str, alone: dict[str, Trained], pair: list[dict[str, Any]]
) -> None:
    for rank in pair:
        half, overflowed = rank[f"{kind} scaled"]
        close(half.tensors, alone["adamw"].half.tensors, TOLERANCE)
        close(half.ema, alone["adamw"].half.ema, TOLERANCE)
        identical(overflowed, half)


def test_no_stage_and_no_optimizer_imports_torchs_compiler(pair: list[dict[str, Any]]) -> None:
    assert [rank["compiler"] for rank in pair] == [False, False]


def test_weight_decay_is_on_matrices_alone() -> None:
    groups: list[dict[str, Any]] = build_optimizer(Toy(), OptimizerConfig(weight_decay=0.1)).param_groups
    decayed = {tuple(p.shape) for group in groups if group["weight_decay"] for p in group["params"]}
    plain = {tuple(p.shape) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {(13, 7), (5, 13), (3, 5)}
    assert plain == {(WORDS, 7), (13,), (5,), (1,)}


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.25, 1, 1, 1, 1]),
        ("linear", [0.25, 1, 0.775, 0.55, 0.1]),
        ("cosine", [0.25, 1, 0.868198, 0.55, 0.1]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_its_end(schedule: Any, wanted: list[float]) -> None:
    config = OptimizerConfig(warmup_steps=4, schedule=schedule, final_lr=0.1)
    scales = [learning_rate_scale(step, 104, config) for step in (0, 4, 29, 54, 104)]
    assert scales == pytest.approx(wanted, abs=1e-6)


def test_the_average_starts_fast_and_leaves_the_weights_alone() -> None:
    engine = make_engine("plain")
    ema = Ema(engine, 0.9)
    start = full_weights(engine)
    for shard in engine.shards():
        shard.add_(1.0)
    ema.update()
    moved = ema.weights()
    for name, value in start.items():
        torch.testing.assert_close(moved[name], value + 9 / 11)  # decay (1 + 1) / (10 + 1)
        torch.testing.assert_close(engine.read(name), value + 1)
    ema.restore(start, 50)
    close(ema.weights(), start, 0)
    assert ema.updates == 50
