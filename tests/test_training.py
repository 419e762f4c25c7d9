"""The four trainings on tiny data: a restart changes nothing, nor does the world size; inputs do what they should."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tiny
from ranks import run_ranks
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.training import ClipConfig, SuperresConfig, TrainConfig, VqganConfig
from raymuse.datasets import shapes
from raymuse.models.clip import Clip
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import nearest_codes
from raymuse.storage.checkpoint import newest
from raymuse.tracking.run import Run
from raymuse.training import scaling
from raymuse.training.build import build_engine, build_task, train_here
from raymuse.training.clip import ClipTask, train_tokenizer
from raymuse.training.codebook import Codebook
from raymuse.training.masked import MaskedTask
from raymuse.training.task import Batch
from raymuse.training.tokens import add_low_noise
from raymuse.training.vqgan import VqganTask
from trainings import losses_of

STEPS, WORLD_STEPS = 12, 4


@dataclass(frozen=True)
class Data:
    """Folders of tiny shards, encoders, and token shards with states and with text ids."""

    shards: str
    encoders: str
    states: str
    ids: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    states = tiny.write_tokens(root / "states", shards, encoders)
    return Data(shards, encoders, states, tiny.write_tokens(root / "ids", shards, encoders, text="ids"))


def base(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return tiny.base_config(root, data.states, **{"ema_decay": 0.9, **changes})


def superres(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return tiny.superres_config(root, data.states, **{"ema_decay": 0.9, **changes})


def wide(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """With a matrix that ZeRO-3 really shards: smaller ones than 100,000 numbers it keeps whole on every rank."""
    return base(root, data, **{"model": {**tiny.UVIT, "intermediate_size": 4096}, **changes})


def muse(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """Muse's own base, with a matrix that ZeRO-3 shards."""
    model = {**tiny.MASKGIT, "intermediate_size": 8192}
    return base(root, data, **{"architecture": "maskgit", "model": model, **changes})


def wide_superres(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """The same of a super-resolution."""
    return superres(root, data, **{"model": {**tiny.SUPERRES, "intermediate_size": 8192}, **changes})


def exact(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """Sums of three rows at a time, which do not divide the batch of eight."""
    return base(root, data, **{"exact_rows": 3, **changes})


def exact_muon(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return exact(root, data, **{"optimizer": {"name": "muon", "lr": 2e-3, "clip_norm": 0.1}, **changes})


def exact_lion(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return exact(root, data, **{"optimizer": {"name": "lion", "lr": 5e-4}, **changes})


def exact_adafactor(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return exact(root, data, **{"optimizer": {"name": "adafactor", "lr": 1e-2}, **changes})


def exact_low(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return exact(root, data, **{"precision": "bf16", **changes})


def exact_half(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return exact(root, data, **{"precision": "fp16", **changes})


def dropped(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """Features are dropped, other ones at every step."""
    return base(root, data, **{"model": {**tiny.UVIT, "hidden_dropout": 0.3, "attention_dropout": 0.2}, **changes})


def exact_dropped(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return dropped(root, data, **{"exact_rows": 3, **changes})


def exact_superres(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return superres(root, data, **{"exact_rows": 2, **changes})


def vqgan(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return tiny.vqgan_config(root, data.shards, **changes)


def gan(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """With an adversary, an average, and a codebook that is revived at once."""
    adversarial = {"start": 1, "channels": 8, "layers": 2}
    revived = {"codebook_decay": 0.5, "revive_below": 0.8, "revive_until": 1.0}
    return vqgan(root, data, **{"adversarial": adversarial, "ema_decay": 0.9, **revived, **changes})


def clip(root: Path, data: Data, **changes: Any) -> TrainConfig:
    return tiny.clip_config(root, data.shards, **changes)


TRAININGS: dict[str, Callable[..., TrainConfig]] = {
    "base": base,
    "superres": superres,
    "vqgan": vqgan,
    "gan": gan,
    "clip": clip,
}
EXACT = {
    "exact": exact,
    "exact muon": exact_muon,
    "exact lion": exact_lion,
    "exact adafactor": exact_adafactor,
    "exact low": exact_low,
    "exact half": exact_half,
    "exact dropped": exact_dropped,
    "exact superres": exact_superres,
}
KINDS = {**TRAININGS, **EXACT, "dropped": dropped, "wide": wide, "muse": muse, "wide superres": wide_superres}


class WorkerLostError(Exception):
    """What a report raises where the platform takes the worker away."""


def fit(config: TrainConfig, stop_at: int | None = None) -> list[float]:
    """Train as a worker does; the loss of every step. `stop_at` loses the worker after that step's checkpoint."""

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == stop_at:
            raise WorkerLostError

    return losses_of(config, build_task(config), report)


def logged(steps: int = STEPS) -> dict[str, Any]:
    return {"steps": steps, "log_every": 1, "checkpoint": {"every": steps, "keep": 1}}


def saved(config: TrainConfig) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint: weights, moments, average, codebook."""
    found = newest(Path(config.output))
    assert found is not None
    assert found.step == config.steps
    return found.tensors()


def assert_same(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(ours[name], value)] == []


# --- restarts


@pytest.mark.parametrize("name", [*TRAININGS, "dropped", "exact dropped"])
def test_a_training_that_lost_its_worker_ends_with_the_same_bits(name: str, data: Data, tmp_path: Path) -> None:
    straight = KINDS[name](tmp_path / "straight", data, checkpoint={"every": 6, "keep": 2})
    broken = KINDS[name](tmp_path / "broken", data, checkpoint={"every": 6, "keep": 2})
    fit(straight)
    with pytest.raises(WorkerLostError):
        fit(broken, stop_at=6)
    fit(broken)
    tensors = saved(straight)
    assert_same(saved(broken), tensors)
    kinds = {key.split("/")[0] for key in tensors}
    kept = {"ema"} if straight.ema_decay else set()
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | kept | ({"extra"} if name in ("vqgan", "gan") else set())
    models = [sorted(Path(config.output, "model").rglob("*.safetensors")) for config in (straight, broken)]
    assert [path.read_bytes() for path in models[0]] == [path.read_bytes() for path in models[1]]
    assert len(models[0]) >= 1


def test_dropout_differs_from_micro_batch_to_micro_batch(data: Data, tmp_path: Path, monkeypatch: Any) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    fit(dropped(tmp_path, data, steps=3, micro_batch_size=4))
    assert len(seeds) == len(set(seeds)) == 3 * 2


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(data: Data, tmp_path: Path) -> None:
    changes = {"log_every": 1, "checkpoint": {"every": 4, "keep": 3}}
    straight, broken = (base(tmp_path / name, data, **changes) for name in ("straight", "broken"))
    fit(straight)
    with pytest.raises(WorkerLostError):
        fit(broken, stop_at=8)
    share = Path(broken.output) / "step-00000008" / "rank-00000.safetensors"
    share.write_bytes(share.read_bytes()[:-1])
    assert len(fit(broken)) == STEPS - 4
    assert_same(saved(broken), saved(straight))


# --- the world's size


def train_everywhere(root: Path, data: Data, names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, weights and this rank's own codes of each training."""
    trained = {}
    for name in names:
        kind, _, zero = name.partition("@")
        more = {"workers": torch.distributed.get_world_size(), "zero": {"stage": int(zero)}} if zero else {}
        config = KINDS[kind](root / name, data, **{**logged(WORLD_STEPS), **changes, **more})
        task = build_task(config)
        losses = losses_of(config, task)
        own = {name: value.clone() for name, value in task.extra_state().items()}
        trained[name] = (losses, saved(config), own)
    return trained


WORLDS = {
    2: ["superres", "vqgan", "gan", "clip", "base@2", "wide@3", "muse@3", "exact@2", "exact muon@1", "exact lion@2"],
    3: ["base", "vqgan", "gan", "clip", "base@2", "exact@1", "exact muon@2", "exact superres@0", "exact adafactor@0"],
    4: ["wide@1", "exact@2", "exact superres@1", "exact low@2", "exact half@1", "exact dropped@1"],
}


@pytest.fixture(scope="module")
def one(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_everywhere(tmp_path_factory.mktemp("one"), data, [*TRAININGS, *EXACT, "wide", "muse"], {})


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, data: Data, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("world")
    return run_ranks(train_everywhere, request.param, root, root, data, WORLDS[request.param], {})


def test_losses_and_weights_do_not_depend_on_the_world_size(one: dict[str, Any], world: list[dict[str, Any]]) -> None:
    """Three processes do not divide the batch of eight; `@3` is DeepSpeed at ZeRO 3. `make soak` has every cell."""
    for name, (losses, tensors, _) in world[0].items():
        wanted, weights, _ = one[name.partition("@")[0]]
        assert len(losses) == WORLD_STEPS
        assert losses == pytest.approx(wanted, abs=1e-5), name
        assert tensors.keys() == weights.keys()
        worst = max(float((tensors[key] - value).abs().max()) for key, value in weights.items())
        assert worst < 1e-3, name


def test_exact_sums_give_the_same_bits_in_every_world(one: dict[str, Any], world: list[dict[str, Any]]) -> None:
    found = {name: trained for name, trained in world[0].items() if name.startswith("exact")}
    assert len(found) >= 2
    for name, (losses, tensors, _) in found.items():
        wanted, weights, _ = one[name.partition("@")[0]]
        assert losses == pytest.approx(wanted, rel=1e-6)  # their own sum is in the order of the ranks
        assert_same(tensors, weights)


LONG = logged(40)
TRANSFORMERS = ("wide", "muse", "wide superres")
EVERY_CELL = [f"{kind}@{stage}" for kind in TRANSFORMERS for stage in range(4)]


@pytest.fixture(scope="module")
def long_one(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_everywhere(tmp_path_factory.mktemp("long"), data, list(TRANSFORMERS), LONG)


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_forty_losses_are_the_same_in_every_world_at_every_stage(
    size: int, long_one: dict[str, Any], data: Data, tmp_path: Path
) -> None:
    trained = run_ranks(train_everywhere, size, tmp_path, tmp_path, data, EVERY_CELL, LONG)[0]
    for name, (losses, _, _) in trained.items():
        wanted = long_one[name.partition("@")[0]][0]
        apart = max(abs(ours - theirs) for ours, theirs in zip(losses, wanted, strict=True))
        print(f"{name} on {size}: {apart:.1e} apart", flush=True)
        assert len(losses) == 40
        assert apart <= 1e-5, (name, apart)


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("name", ["vqgan", "gan"])
def test_every_rank_holds_the_same_codebook_and_adversary(name: str, world: list[dict[str, Any]]) -> None:
    wanted = world[0][name][2]
    assert ("adversary/scale" in wanted) == (name == "gan")
    for rank in world[1:]:
        assert_same(rank[name][2], wanted)
    if name == "gan":
        assert int(wanted["started"][1]) > 0  # codes were revived
        assert wanted["adversary/counts"].tolist() == [1, WORLD_STEPS - 1]


@pytest.mark.parametrize("name", ["base", "superres", "vqgan", "gan"])
def test_micro_batches_change_no_loss(name: str, one: dict[str, Any], data: Data, tmp_path: Path) -> None:
    trained = train_everywhere(tmp_path, data, [name], {"micro_batch_size": 3})
    assert trained[name][0] == pytest.approx(one[name][0], abs=1e-5)


# --- masked training


def everything(config: TrainConfig, count: int) -> tuple[MaskedTask, Batch]:
    task = build_task(config)
    assert isinstance(task, MaskedTask)
    return task, task.batch(np.arange(count), np.ones(count, np.float32))


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_captions_drop_at_the_rate_asked_for_states_and_pooled_together(
    share: float, data: Data, tmp_path: Path
) -> None:
    count = 10_000
    task, batch = everything(superres(tmp_path, data, caption_dropout=share), count)
    _, kept = everything(superres(tmp_path, data, caption_dropout=0), count)
    states = (batch["states"] != kept["states"]).flatten(1).any(dim=1)
    pooled = (batch["pooled"] != kept["pooled"]).any(dim=1)
    assert torch.equal(states, pooled)
    assert abs(float(states.float().mean()) - share) < 3 * math.sqrt(share * (1 - share) / count)
    assert torch.equal(batch["states"][states], task.stream.empty_states.expand(int(states.sum()), -1, -1))
    assert torch.equal(batch["pooled"][states], task.stream.empty_pooled.expand(int(states.sum()), -1))
    empty = TextEncoder.load(data.encoders)([""])
    torch.testing.assert_close(task.stream.empty_states, empty[0], atol=2e-3, rtol=2e-3)  # as stored: fp16
    torch.testing.assert_close(task.stream.empty_pooled, empty[1], atol=2e-3, rtol=2e-3)
    assert torch.equal(batch["low_ids"], kept["low_ids"])


def test_low_ids_are_replaced_at_the_rate_asked_for() -> None:
    count, length, codes, most = 10_000, 16, 32, 0.3
    low = torch.randint(codes, (count, 4, 4), generator=torch.Generator().manual_seed(0))
    noisy = add_low_noise(low, np.arange(count), 1, most, codes)
    assert noisy.shape == low.shape
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < codes
    changed = (noisy != low).flatten(1).float().mean(dim=1)
    seen = 1 - 1 / codes  # a random code may be the old one
    spread = most / 2 * (1 - most / 2) / length + most**2 / 12
    assert abs(float(changed.mean()) - most / 2 * seen) < 3 * math.sqrt(spread / count)
    assert float(changed.max()) > most  # shares differ between samples
    assert torch.equal(add_low_noise(low, np.arange(count), 1, 0.0, codes), low)
    assert torch.equal(add_low_noise(low[5:6], np.array([5]), 1, most, codes), noisy[5:6])


def test_a_batch_masks_and_weighs_as_asked(data: Data, tmp_path: Path) -> None:
    task = build_task(base(tmp_path, data, ids="image_ids"))
    positions, weights = np.arange(6), np.array([1, 1, 1, 1, 0, 0], np.float32)
    batch = task.batch(positions, weights)
    assert batch["ids"].shape == batch["targets"].shape == batch["mask"].shape == (6, 8, 8)
    assert task.count(batch) == float(batch["mask"].sum())
    assert not batch["mask"][4:].any()
    assert batch["mask"][:4].flatten(1).any(dim=1).all()
    assert torch.equal(batch["ids"][:4][~batch["mask"][:4]], batch["targets"][:4][~batch["mask"][:4]])
    assert (batch["ids"][batch["mask"]] == tiny.CODES + 63).all()
    assert batch["micro"].tolist() == [[32, 32, 0, 0, 6]] * 6
    low = build_task(base(tmp_path, data)).batch(positions, weights)
    assert low["targets"].shape == (6, 4, 4)


def test_stored_states_and_text_ids_train_to_the_same_loss(data: Data, tmp_path: Path) -> None:
    from_states = fit(base(tmp_path / "states", data, **logged()))
    ids = tiny.base_config(tmp_path / "ids", data.ids, ema_decay=0.9, text_encoder=data.encoders, **logged())
    assert fit(ids) == pytest.approx(from_states, rel=1e-3)


def test_a_trained_superres_loses_by_other_pictures_low_ids(data: Data, tmp_path: Path) -> None:
    config = superres(tmp_path, data, steps=150, batch_size=16, ema_decay=None, checkpoint={"every": 150})
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e-2})})
    task = build_task(config)
    losses_of(config, task)
    batch = task.batch(np.arange(10_000, 10_048), np.ones(48, np.float32))
    with torch.no_grad():
        right, _ = task.module(batch)
        wrong, _ = task.module({**batch, "low_ids": batch["low_ids"].roll(1, dims=0)})
    assert float(wrong) > 1.05 * float(right)


def test_rectangles_and_weight_on_known_ids_do_not_depend_on_micro_batches(data: Data, tmp_path: Path) -> None:
    changes = {**logged(3), "rectangle_share": 0.5, "unmasked_weight": 0.1}
    losses = fit(base(tmp_path / "whole", data, **changes))
    assert fit(base(tmp_path / "parts", data, micro_batch_size=3, **changes)) == pytest.approx(losses, abs=1e-5)
    assert losses != fit(base(tmp_path / "plain", data, **logged(3)))


def test_known_ids_count_with_their_weight(data: Data, tmp_path: Path) -> None:
    task, batch = everything(base(tmp_path, data, unmasked_weight=0.25), 8)
    with torch.no_grad():
        loss, _ = task.module(batch)
        logits = task.network.head(task.network.features(batch["ids"], task.module.condition(batch)))
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 2), batch["targets"].flatten(), reduction="none")
    weights = torch.where(batch["mask"].flatten(), 1.0, 0.25)
    assert float(loss) == pytest.approx(float((each * weights).sum()), rel=1e-5)
    assert task.count(batch) == float(weights.sum())


def test_the_loss_by_masking_ratio_is_that_of_its_samples(data: Data, tmp_path: Path) -> None:
    task, batch = everything(base(tmp_path, data), 64)
    with torch.no_grad():
        loss, metrics = task.module(batch)
        of_decile: dict[str, list[float]] = {}
        for row in range(64):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            ratio = float(one["mask"].float().mean())
            name = f"loss_at_{min(int(ratio * 16 * 10 / 17), 9) / 10}"
            of_decile.setdefault(name, []).append(float(task.module(one)[0]))
    for name, losses in of_decile.items():
        assert float(metrics[name]) == pytest.approx(sum(losses), rel=1e-4), name
    named = [name for name in metrics if name.startswith("loss_at_") and not name.endswith(":of")]
    assert sum(float(metrics[name]) for name in named) == pytest.approx(float(loss), rel=1e-5)
    assert sum(float(metrics[f"{name}:of"]) for name in named) == float(batch["mask"].sum())
    assert 0 < float(metrics["entropy"]) / float(batch["mask"].sum()) <= math.log(tiny.CODES) + 1e-5


# --- losses that are no numbers


def poison(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, steps: set[int]) -> Any:
    """The config's task with one picture, or one text, made infinite at some steps (from 0)."""
    task = build_task(config)
    plain = task.batch

    def batch(positions: NDArray[np.int64], weights: NDArray[np.float32]) -> Batch:
        made = plain(positions, weights)
        if positions[0] // config.batch_size in steps:
            made["pixels" if "pixels" in made else "states"][0] = float("inf")
        return made

    monkeypatch.setattr(task, "batch", batch)
    return task


@pytest.mark.parametrize("name", TRAININGS)
def test_a_step_without_a_finite_loss_is_passed_over(
    name: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TRAININGS[name](tmp_path, data, **logged(6))
    task = poison(monkeypatch, config, {2, 4})
    losses = losses_of(config, task)
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, False, True]
    assert all(bool(value.isfinite().all()) for value in saved(config).values())
    found = newest(Path(config.output))
    assert found is not None
    assert (found.state["updates"], found.state["skipped"]) == (4, 2)
    lines = [json.loads(line) for line in Path(config.output, "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert [len(line["keys"]) for line in lines] == [8, 8]
    assert all(isinstance(key, str) for line in lines for key in line["keys"])


def test_too_many_of_them_in_a_row_end_the_run(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = base(tmp_path, data, **logged(12), max_skipped=3)
    with pytest.raises(UserError, match=r"in 3 steps in a row, up to step 8; none of them changed the weights"):
        losses_of(config, poison(monkeypatch, config, {2, 5, 6, 7}))


@pytest.mark.parametrize(
    ("asked", "able", "taken", "told"),
    [
        ("auto", True, "bf16", "precision: bf16"),
        ("auto", False, "fp32", "precision: fp32, since 1 of 1 workers have no hardware for products in bf16"),
        ("bf16", False, "bf16", "precision: bf16 is emulated, far slower than fp32: 1 of 1 workers"),
        ("bf16", True, "bf16", None),
        ("fp32", False, "fp32", None),
    ],
)
def test_the_number_type_is_the_hardwares_and_is_said(
    asked: str, able: bool, taken: str, told: str | None, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymuse.training.build.multiplies_bf16", lambda device_type: able)
    lines: list[str] = []
    config = base(tmp_path, data, precision=asked, steps=1, workers=0, ema_decay=None)
    assert train_here(config, Run.off(), lambda *_: None, lines.append)
    assert json.loads((Path(config.output) / "training.json").read_text())["precision"] == taken
    said = [line for line in lines if line.startswith("precision")]
    assert [line.startswith(told or "") for line in said] == [True] * (told is not None)


def test_fp16_finds_the_factor_that_its_gradients_bear_and_keeps_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that overflow on the way change nothing and are no fault of the data; a resume has the same bits."""
    monkeypatch.setattr(scaling, "START", 2.0**24)
    changes = {"precision": "fp16", "log_every": 1, "checkpoint": {"every": 6, "keep": 2}}
    straight, broken = (base(tmp_path / name, data, **changes) for name in ("straight", "broken"))
    losses = fit(straight)
    found = newest(Path(straight.output))
    assert found is not None
    lowered = round(math.log2(2.0**24 / found.state["loss_scale"][0]))
    assert lowered > 0
    assert (found.state["updates"], found.state["skipped"]) == (STEPS - lowered, 0)
    assert not Path(straight.output, "skipped.jsonl").exists()
    assert {value.dtype for value in saved(straight).values()} == {torch.float32}
    wanted = fit(base(tmp_path / "fp32", data, **logged()))
    assert losses[0] == pytest.approx(wanted[0], rel=1e-3)  # later ones are some steps behind
    assert losses[-1] < losses[0]
    with pytest.raises(WorkerLostError):
        fit(broken, stop_at=6)
    fit(broken)
    assert_same(saved(broken), saved(straight))


def test_gradient_checkpointing_changes_no_loss(data: Data, tmp_path: Path) -> None:
    plain = fit(superres(tmp_path / "plain", data, **logged(3)))
    assert fit(superres(tmp_path / "again", data, gradient_checkpointing=True, **logged(3))) == plain


def test_a_base_training_starts_from_a_model_folder(data: Data, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", data.encoders)
    task = build_task(base(tmp_path, data, ids="image_ids", start_from=model))
    fresh = build_task(base(tmp_path, data, ids="image_ids", start_from=model))
    assert isinstance(task, MaskedTask)
    assert all(p.requires_grad for p in task.network.parameters())
    assert_same(dict(task.module.state_dict()), dict(fresh.module.state_dict()))
    assert float(task.network.state_dict()["embed.embeddings.weight"].std()) == pytest.approx(0.3, rel=0.1)


# --- what cannot work is said before any step

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "base field": ("base", {"model": {**tiny.UVIT, "depth": 3}}, "model.depth: no such field; it has"),
    "base heads": ("base", {"model": {**tiny.UVIT, "num_attention_heads": 3}}, "not a multiple of num_attention_heads"),
    "superres field": ("superres", {"model": {"layers": 3}}, "model.layers: no such field; it has"),
    "superres sizes": ("superres", {"model": {**tiny.SUPERRES, "high_grid": 9}}, "is not a multiple of low_grid"),
    "vqgan field": ("vqgan", {"model": {**tiny.VQGAN, "depth": 3}}, "depth"),
    "vqgan groups": ("vqgan", {"model": {**tiny.VQGAN, "norm_num_groups": 3}}, "are no multiples of norm_num_groups=3"),
    "vqgan crop": ("vqgan", {"crop": 14}, "crop=14 is no multiple of the VQGAN's factor 4"),
    "vqgan resolution": ("vqgan", {"resolutions": (16, 30)}, "resolutions=30 is no multiple of the VQGAN's factor 4"),
    "vqgan small": ("vqgan", {"resolutions": (12, 32)}, "resolutions=12 is below crop=16"),
    "clip field": ("clip", {"model": {"depth": 3}}, "model.depth: no such field; it has width"),
    "clip heads": ("clip", {"model": {**tiny.CLIP, "heads": 3}}, "model.width=16 is no multiple of model.heads=3"),
    "clip patch": ("clip", {"model": {**tiny.CLIP, "patch_size": 64}}, "model.patch_size=64 is above resolution=32"),
    "clip micro batch": ("clip", {"micro_batch_size": 4}, "micro_batch_size=4: a pair is held against all others"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_recipe_that_cannot_work_is_a_config_error(case: str, data: Data, tmp_path: Path) -> None:
    name, changes, complaint = WRONG[case]
    with pytest.raises(ConfigError, match=f"train-{name}: 1 problem") as caught:
        build_task(TRAININGS[name](tmp_path, data, **changes))
    assert complaint in str(caught.value)


def test_text_ids_without_an_encoder_are_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds text ids, not states: set text_encoder"):
        build_task(tiny.base_config(tmp_path, data.ids))


# --- VQGAN


def blobs(count: int, centres: Tensor, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return centres.repeat_interleave(count, dim=0) + 0.01 * torch.randn(count * len(centres), 2, generator=draw)


CENTRES = torch.tensor([[0.0, 0.0], [0.0, 4.0], [4.0, 0.0], [4.0, 4.0]])


def test_the_first_codes_come_from_the_data() -> None:
    weight = torch.full((16, 2), 100.0)
    codebook = Codebook(weight, decay=0.9, revive_below=0.1, seed=0)
    assert not codebook.started
    codebook.start(blobs(50, CENTRES), step=7)
    assert codebook.started
    distances = torch.cdist(weight, CENTRES).min(dim=1).values
    assert float(distances.max()) < 0.05
    assert float(torch.cdist(CENTRES, weight).min(dim=1).values.max()) < 0.05


def test_a_collapsed_codebook_comes_back_to_life_and_says_how_much_of_it_is_used() -> None:
    weight = torch.full((4, 2), 100.0)
    weight[0] = 2.0
    codebook = Codebook(weight, decay=0.5, revive_below=0.1, seed=0)
    usage, perplexity = [], []
    for step in range(30):
        latents = blobs(20, CENTRES, seed=step)
        care = codebook.update(latents, torch.cdist(latents, weight).argmin(dim=1), step, revive=True)
        usage.append(care["codebook_usage"])
        perplexity.append(care["codebook_perplexity"])
    assert perplexity[0] == pytest.approx(1.0)
    assert care["codes_revived"] >= 3
    assert usage[-1] == 1.0
    assert perplexity[-1] > 1.8
    assert float(weight.max()) < 5


def test_without_revival_dead_codes_stay_where_they_are() -> None:
    weight = torch.tensor([[0.0, 0.0], [50.0, 50.0]])
    codebook = Codebook(weight, decay=0.5, revive_below=0.1, seed=0)
    for step in range(10):
        latents = blobs(20, CENTRES, seed=step)
        care = codebook.update(latents, torch.zeros(80, dtype=torch.long), step, revive=False)
    assert weight[1].tolist() == [50.0, 50.0]
    assert weight[0].tolist() == pytest.approx([2.0, 2.0], abs=0.01)
    assert care["codebook_usage"] == 0.5


def test_a_vqgan_training_reports_usage_and_gets_better(data: Data, tmp_path: Path) -> None:
    config = vqgan(tmp_path, data, **logged(40))
    assert isinstance(config, VqganConfig)
    losses = fit(config)
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    task = VqganTask(config)
    task.load_extra_state({name[6:]: value for name, value in saved(config).items() if name.startswith("extra/")})
    assert task.module.quantise
    task.module(task.batch(np.arange(8), np.ones(8, np.float32)))
    care = task.after_step(3, build_engine(config, task))
    assert 0 < care["codebook_usage"] <= 1
    assert care["codebook_perplexity"] > 2


def test_the_nearest_code_is_the_one_of_least_distortion_and_price() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    codebook = Codebook(weight, decay=0.5, revive_below=0.0, seed=0)
    latents = torch.tensor([[0.1, 0.0]] * 90 + [[0.9, 0.0]] * 8 + [[8.9, 0.0]] * 2)
    ids = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    for step in range(20):
        codebook.update(latents, ids, step, revive=False, rate=2.0)
    nats = -(codebook.counts / codebook.counts.sum()).log()
    torch.testing.assert_close(weight[:, 1].square(), 2.0 * codebook.distortion * nats)
    probes = torch.cat([torch.linspace(0, 9, 91)[:, None], torch.zeros(91, 1)], dim=1)
    costs = (probes[:, :1] - weight[:, 0]).square() + 2.0 * codebook.distortion * nats
    chosen = nearest_codes(probes.T[None, :, :, None], weight)[0, :, 0]
    assert chosen.tolist() == costs.argmin(dim=1).tolist()
    assert set(chosen.tolist()) == {0, 1, 2}


def test_a_priced_vqgan_spends_fewer_bits_and_stays_a_plain_vqmodel(data: Data, tmp_path: Path) -> None:
    from diffusers import VQModel  # here: every rank imports this file

    entropies = []
    for rate in (0.0, 2.0):
        config = vqgan(tmp_path / str(rate), data, rate_weight=rate, **logged(40))
        fit(config)
        network = VQModel.from_pretrained(Path(config.output) / "model", low_cpu_mem_usage=False)
        pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            latents = network.encode(pixels).latents
            _, _, (_, _, ids) = network.quantize(latents)
        assert ids.flatten().tolist() == nearest_codes(latents, network.quantize.embedding.weight).flatten().tolist()
        counts = torch.bincount(ids.flatten()).float()
        share = counts[counts > 0] / counts.sum()
        entropies.append(float(-(share * share.log()).sum()))
        if rate:
            assert torch.count_nonzero(latents[:, -1]) == 0
            assert torch.count_nonzero(network.post_quant_conv.weight[:, -1]) == 0
            assert torch.count_nonzero(network.quantize.embedding.weight[:, -1]) > 0
    assert entropies[1] < entropies[0]


def test_the_last_steps_are_on_whole_pictures_the_same_ones_in_any_world(data: Data, tmp_path: Path) -> None:
    task = VqganTask(vqgan(tmp_path, data, steps=4, batch_size=8, whole_share=0.5))  # type: ignore[arg-type]
    cropped = task.batch(np.arange(8, 16), np.ones(8, np.float32))["pixels"]
    assert cropped.shape[2:] == (tiny.LOW_SIDE, tiny.LOW_SIDE)
    assert task.batch(np.arange(24, 32), np.ones(8, np.float32))["pixels"].shape[2:] == cropped.shape[2:]
    alone = task.batch(np.arange(16, 24), np.ones(8, np.float32))
    assert alone["pixels"].shape == (2, 3, tiny.SIDE, tiny.SIDE)
    ranks = [task.batch(np.arange(start, start + 2), np.ones(2, np.float32)) for start in range(16, 24, 2)]
    assert [rank["weights"].tolist() for rank in ranks] == [[1.0], [0.0], [1.0], [0.0]]
    counted = torch.cat([rank["pixels"][rank["weights"] > 0] for rank in ranks])
    torch.testing.assert_close(counted, alone["pixels"], rtol=0, atol=0)


# --- CLIP


def test_the_text_encoder_is_the_clips_own_text_tower(data: Data, tmp_path: Path) -> None:
    config = clip(tmp_path, data)
    fit(config)
    folder = f"{config.output}/model"
    captions = ["a small red circle on a white background", "", "猫"]
    _, pooled = TextEncoder.load(folder)(captions)
    seen = Clip.load(folder).texts(captions)
    torch.testing.assert_close(pooled / pooled.norm(dim=-1, keepdim=True), seen)
    assert TextEncoder.load(folder).length == tiny.TEXT_LENGTH


def test_equal_captions_share_the_target_and_padding_counts_nothing(data: Data, tmp_path: Path) -> None:
    config = clip(tmp_path, data)
    assert isinstance(config, ClipConfig)
    task = ClipTask(config)
    batch = task.batch(np.arange(6), np.ones(6, np.float32))
    loss, _ = task.module(batch)
    padded = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}
    padded["weights"][6:] = 0
    assert task.module(padded)[0].item() == pytest.approx(loss.item(), abs=1e-5)
    ids = torch.tensor([[1, 2], [1, 2], [3, 4]])
    targets = task.module._targets(ids, ids, torch.ones(3))
    assert targets.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


def test_a_tokenizer_with_room_for_merges_learns_words_and_takes_any_text(data: Data, tmp_path: Path) -> None:
    config = clip(tmp_path, data)
    assert isinstance(config, ClipConfig)
    task = ClipTask(config)
    captions = [task.pictures.index.captions(number)[0] for number in range(len(task.pictures.index))]
    lengths = [len(task.tokenizer(caption).input_ids) for caption in captions]
    assert max(lengths) <= tiny.TEXT_LENGTH
    assert len(task.tokenizer) <= config.vocabulary
    odd = task.tokenizer("naïve 猫 🙂").input_ids
    assert task.tokenizer.decode(odd, skip_special_tokens=True).strip() == "naïve 猫 🙂"


@pytest.mark.parametrize("count", [16, 96])  # of few captions most pairs are equally frequent
def test_a_tokenizer_of_the_same_captions_is_the_same_each_time(count: int) -> None:
    captions = [sample.caption for sample in shapes.samples(count, 0, tiny.SIDE, held_out=False)]
    made = [train_tokenizer(captions, 640, tiny.TEXT_LENGTH).backend_tokenizer.to_str() for _ in range(8)]
    assert len(set(made)) == 1


def test_low_noise_belongs_to_the_recipe(data: Data, tmp_path: Path) -> None:
    quiet, loud = (superres(tmp_path, data, low_noise=noise) for noise in (0.0, 0.5))
    assert isinstance(quiet, SuperresConfig)
    (_, clean), (_, noisy) = everything(quiet, 48), everything(loud, 48)
    share = float((clean["low_ids"] != noisy["low_ids"]).float().mean())
    assert share == pytest.approx(0.25, abs=0.08)
