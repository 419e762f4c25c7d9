"""A training with a budget of minutes: as long as its machine allows, decided once, and the same for all ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from ranks import run_ranks
from raymuse.config.data import DataConfig
from raymuse.config.flow import FlowConfig
from raymuse.config.load import load
from raymuse.config.training import TIMED_STEPS, BaseConfig, MaskedConfig, OptimizerConfig
from raymuse.flow import Record, in_time
from raymuse.storage.checkpoint import newest
from raymuse.training import loop
from raymuse.training.build import build_task
from raymuse.training.length import FILE, ROUND, Length
from raymuse.training.optimizers import learning_rate_scale
from trainings import fit_all, losses_of

FEWEST, MOST = TIMED_STEPS, TIMED_STEPS + 12
AMPLE, NONE = 10.0, 1e-6


class LostError(Exception):
    """The platform takes the worker away."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    return tiny.write_tokens(root / "tokens", shards, tiny.write_encoders(root / "encoders", shards))


def config_of(root: Path, tokens: str, minutes: float | None, **changes: Any) -> BaseConfig:
    budget = None if minutes is None else {"minutes": minutes, "max_steps": MOST}
    often = {"log_every": 1, "checkpoint": {"every": 4, "keep": 3}}
    return tiny.base_config(root, tokens, **{"steps": FEWEST, "budget": budget, **often, **changes})


def trained(config: BaseConfig, stop_at: int | None = None) -> list[float]:
    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == stop_at:
            raise LostError

    return losses_of(config, build_task(config), report)


def test_a_quick_machine_trains_for_longer_and_a_slow_one_as_long_as_it_must(tokens: str, tmp_path: Path) -> None:
    quick, slow = (config_of(tmp_path / str(minutes), tokens, minutes) for minutes in (AMPLE, NONE))
    assert len(trained(quick)) == MOST
    assert len(trained(slow)) == FEWEST
    for config, steps in ((quick, MOST), (slow, FEWEST)):
        assert json.loads((Path(config.output) / "training.json").read_text())["steps"] == steps
        assert json.loads((Path(config.output) / FILE).read_text())["steps"] == steps


@pytest.mark.parametrize("minutes", [AMPLE, NONE])
def test_the_learning_rate_never_rises_and_ends_where_it_should(
    minutes: float, tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, tokens, minutes, optimizer={"lr": 2e-3, "warmup_steps": 3})
    scales: list[float] = []

    def scale(step: int, steps: int, optimizer: OptimizerConfig) -> float:
        scales.append(learning_rate_scale(step, steps, optimizer))
        return scales[-1]

    monkeypatch.setattr(loop, "learning_rate_scale", scale)
    steps = len(trained(config))
    assert scales[2:] == sorted(scales[2:], reverse=True)
    assert scales[TIMED_STEPS:] == [
        learning_rate_scale(one, steps, config.optimizer) for one in range(TIMED_STEPS, steps)
    ]


@pytest.mark.parametrize("lost_at", [TIMED_STEPS - 4, TIMED_STEPS, TIMED_STEPS + 4])
def test_a_restart_ends_with_the_bits_of_a_training_that_was_not_disturbed(
    lost_at: int, tokens: str, tmp_path: Path
) -> None:
    straight, broken = (config_of(tmp_path / name, tokens, AMPLE) for name in ("straight", "broken"))
    trained(straight)
    with pytest.raises(LostError):
        trained(broken, stop_at=lost_at)
    trained(broken)
    ours, wanted = newest(Path(broken.output)), newest(Path(straight.output))
    assert ours is not None
    assert wanted is not None
    assert ours.step == MOST
    found = ours.tensors()
    assert [name for name, value in wanted.tensors().items() if not torch.equal(found[name], value)] == []


def test_what_was_decided_holds_though_the_machine_is_another(tokens: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, tokens, AMPLE)
    Path(config.output).mkdir(parents=True)
    (Path(config.output) / FILE).write_text(json.dumps({"steps": FEWEST + 5}))
    assert len(trained(config)) == FEWEST + 5


def test_a_training_keeps_its_length_though_its_workers_become_a_range(tokens: str, tmp_path: Path) -> None:
    """Whose sums are exact, and which would have been as long as its config says from the start."""
    config = config_of(tmp_path, tokens, AMPLE)
    with pytest.raises(LostError):
        trained(config, stop_at=TIMED_STEPS + 4)
    assert len(trained(config.model_copy(update={"exact_rows": 4}))) == MOST - TIMED_STEPS - 4


def test_a_training_that_is_stopped_before_it_is_decided_is_timed_until_it_is(tokens: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, tokens, AMPLE, budget={"minutes": AMPLE, "max_steps": 2 * MOST}, steps=FEWEST + 20)
    for lost_at in (20, TIMED_STEPS + 4):
        with pytest.raises(LostError):
            trained(config, stop_at=lost_at)
        assert not (Path(config.output) / FILE).exists()
    assert len(trained(config)) == 2 * MOST - TIMED_STEPS - 4


def test_a_training_that_is_as_long_as_its_config_says_stays_so(tokens: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, tokens, AMPLE, steps=FEWEST + 8, exact_rows=4)
    with pytest.raises(LostError):
        trained(config, stop_at=TIMED_STEPS + 4)
    assert len(trained(config.model_copy(update={"exact_rows": None}))) == 4
    assert not (Path(config.output) / FILE).exists()


def test_two_workers_take_equally_many_steps(tokens: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, tokens, AMPLE, workers=2)
    found = run_ranks(fit_all, 2, tmp_path, [config])
    assert [len(losses) for ((losses, _),) in found] == [MOST, 0]  # rank 0 logs
    assert all(torch.equal(found[0][0][1][name], value) for name, value in found[1][0][1].items())


def test_as_many_steps_as_fit_in_round_numbers(tokens: str, tmp_path: Path) -> None:
    said: list[str] = []
    budget = {"minutes": 2.0, "max_steps": 10_000}
    length = Length(config_of(tmp_path, tokens, None, budget=budget), said.append)
    for done in range(1, TIMED_STEPS + 1):
        assert length.steps == FEWEST
        length.took(5.0 if done <= 10 else 0.25, done)  # the first ones are slow: they do not count
    assert length.steps == 450  # of 480
    assert length.steps % ROUND == 0
    assert said == ["a step takes 0.250 s: 450 steps (40 to 10000)"]


@pytest.mark.parametrize("steps", [TIMED_STEPS - 1, MOST, MOST + 1])
def test_a_training_that_is_too_short_to_be_timed_or_long_enough_is_as_long_as_it_says(
    steps: int, tokens: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tokens, AMPLE, steps=steps)
    assert len(trained(config)) == steps
    assert not (Path(config.output) / FILE).exists()


def test_pictures_that_are_encoded_as_it_trains_are_laid_out_for_a_known_length(tmp_path: Path) -> None:
    stream = {"input": "pictures", "vqgan": "encoders", "text_encoder": "encoders"}
    assert config_of(tmp_path, "tokens", AMPLE).stretch is not None
    assert config_of(tmp_path, "", AMPLE, stream=stream).stretch is None
    assert config_of(tmp_path, "tokens", AMPLE, exact_rows=2).stretch is None


@pytest.mark.parametrize("recipe", ["smoke", "demo-full", "emoji"])
def test_a_recipe_that_says_its_length_has_it(recipe: str) -> None:
    flow = load(recipe, ["base.steps=400", "superres.steps=400"])
    assert isinstance(flow, FlowConfig)
    assert flow.base.stretch is None
    assert flow.superres.stretch is None


# --- the minutes of a whole flow


def demo(**changes: Any) -> FlowConfig:
    config = load("demo", [f"{key}={value}" for key, value in changes.items()], {"flow"})
    assert isinstance(config, FlowConfig)
    return config


def minutes_given(record: Record, name: str, **changes: Any) -> float | None:
    section = in_time(demo(**changes), name, record)
    assert isinstance(section, MaskedConfig | DataConfig)
    return section.budget.minutes if isinstance(section, MaskedConfig) and section.budget is not None else None


QUICK, SLOW = ({"data": 0.05 * 60, "vqgan": minutes * 60, "clip": 0.5 * 60} for minutes in (2.0, 6.0))


def test_a_flow_on_a_slow_machine_leaves_its_trainings_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = (Record(tmp_path / "flow.json", dict(seconds)) for seconds in (QUICK, SLOW))
    assert minutes_given(quick, "base") == 8.5
    quick.seconds["base"] = 60 * 9
    assert minutes_given(quick, "superres") == 5
    assert capsys.readouterr().out == ""
    base = minutes_given(slow, "base")
    assert base == pytest.approx((19.5 - 1.5 * 6.55) * 8.5 / 13.5)
    slow.seconds["base"] = 60 * (base + 1)  # its start and samples come on top
    assert minutes_given(slow, "superres") == pytest.approx(19.5 - 1.5 * 6.55 - base - 1)
    assert f"[base] {base:.1f} of its 8.5 minutes" in capsys.readouterr().out


def test_what_a_flow_gives_does_not_count_its_own_stage_and_may_change(tmp_path: Path) -> None:
    record = Record(tmp_path / "flow.json", dict(SLOW))
    given = minutes_given(record, "base")
    record.seconds["base"] = 1000.0  # it was interrupted
    assert minutes_given(record, "base") == given
    sections = [in_time(demo(minutes=minutes), "base", record) for minutes in ("19.5", "60", "null")]
    assert [one.budget.minutes for one in sections if isinstance(one, MaskedConfig) and one.budget] == [given, 8.5, 8.5]
    assert all(one.identity() == sections[0].identity() for one in sections)  # and so the output is the same one's


def test_a_flow_that_has_no_time_left_gives_next_to_none(tmp_path: Path) -> None:
    assert minutes_given(Record(tmp_path / "flow.json", {"vqgan": 3600.0}), "base") == 0.1


def test_without_minutes_or_budgets_a_flow_gives_what_its_recipe_says(tmp_path: Path) -> None:
    record = Record(tmp_path / "flow.json", dict(SLOW))
    assert minutes_given(record, "base", minutes="null") == 8.5
    assert minutes_given(record, "data") is None
    assert minutes_given(record, "base", **{"base.budget": "null"}) is None
    assert minutes_given(record, "superres", **{"base.budget": "null"}) == 5
