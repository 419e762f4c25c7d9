"""What a training shows of itself while it runs: the loss on held-out rows, and pictures of a user's prompts."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import tiny
from ranks import run_ranks
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import from_values
from raymuse.config.training import TrainConfig
from raymuse.masking import hide
from raymuse.storage.checkpoint import newest
from raymuse.tracking.run import Run
from raymuse.training.alone import opened
from raymuse.training.build import build_engine, build_task
from raymuse.training.ema import Ema
from raymuse.training.engine import full_weights
from raymuse.training.evaluation import evaluation_of
from raymuse.training.loop import Loop
from raymuse.training.masked import MaskedTask
from raymuse.training.task import network_weights

RATIOS = (0.25, 0.75)


@dataclass(frozen=True)
class Data:
    """Folders: encoders, token shards to train on, others that are held out, a base's model folder."""

    encoders: str
    tokens: str
    held: str
    model: str


@dataclass(frozen=True)
class Noted(Run):
    """A run that is not tracked, and keeps the numbers and pictures logged to it."""

    numbers: dict[int, dict[str, float]]
    pictures: dict[int, Any]

    def metrics(self, values: Any, step: int) -> None:
        self.numbers.setdefault(step, {}).update(values)

    def picture(self, name: str, picture: Any, step: int) -> None:
        self.pictures[step] = picture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("validation")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    held = tiny.write_tokens(root / "held", tiny.write_shards(root / "others", count=16), encoders)
    return Data(encoders, tokens, held, tiny.write_model(root / "model", encoders, cascade=True))


def config(root: Path, data: Data, **changes: Any) -> TrainConfig:
    held = {"input": data.held, "every": 3, "rows": 13, "mask_ratios": RATIOS}
    values = {"ids": "image_ids", "ema_decay": 0.9, "steps": 6, "log_every": 1, "checkpoint": {"every": 6}}
    return tiny.base_config(root, data.tokens, **{**values, "evaluation": held, **changes})


def run_of(config: TrainConfig) -> tuple[Noted, dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    task = build_task(config)
    run = Noted(None, Path(), {}, {})
    Loop(config, task, build_engine(config, task), run, lambda *_: None, lambda line: None).fit()
    found = newest(Path(config.output))
    assert found is not None
    return run, found.tensors()


def held_out(config: TrainConfig) -> tuple[dict[int, dict[str, float]], dict[str, torch.Tensor]]:
    """The held-out losses by step, and the last checkpoint."""
    run, tensors = run_of(config)
    return {s: {n: v for n, v in made.items() if n.startswith("eval")} for s, made in run.numbers.items()}, tensors


def run_all(configs: list[TrainConfig]) -> list[Any]:
    return [held_out(config) for config in configs]


# --- held-out loss


def test_the_held_out_loss_is_the_averages_at_each_ratio(data: Data, tmp_path: Path) -> None:
    made = config(tmp_path, data)
    task = build_task(made)
    assert isinstance(task, MaskedTask)
    engine = build_engine(made, task)
    ema = Ema(engine, 0.9)
    with torch.no_grad():
        for average in ema.average:
            average.mul_(1.1)
    task.network.embed.eval()  # as a frozen text encoder is
    evaluation = evaluation_of(made, task, 4)
    assert evaluation is not None
    before = full_weights(engine)
    found = evaluation.measure(engine, ema)
    assert all(torch.equal(value, before[name]) for name, value in full_weights(engine).items())
    assert engine.module.training
    assert not task.network.embed.training
    task.network.load_state_dict(network_weights(ema.weights()))
    batch = evaluation.stream.batch(np.arange(13), np.ones(13, np.float32), task.network.config.mask_id)
    for ratio in RATIOS:
        hidden = hide(batch["targets"].flatten(1), np.arange(13), seed=3, mask_id=tiny.CODES + 63, ratio=ratio)
        mask = hidden.mask.view(13, 8, 8)
        assert (mask.flatten(1).sum(dim=1) == round(64 * ratio)).all()
        with torch.no_grad():
            told = task.network.condition(batch["states"], batch["pooled"], batch["micro"])  # type: ignore[call-arg, arg-type]
            logits = task.network.head(task.network.features(hidden.ids.view(13, 8, 8), told))  # type: ignore[arg-type]
        wanted = F.cross_entropy(logits[mask], batch["targets"][mask])
        assert found[f"eval_loss_at_{ratio}"] == pytest.approx(float(wanted), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(np.mean([found[f"eval_loss_at_{ratio}"] for ratio in RATIOS]))


def test_it_changes_no_bit_of_the_training_and_is_the_same_at_every_stage(data: Data, tmp_path: Path) -> None:
    wide = {"model": {**tiny.UVIT, "intermediate_size": 4096}}
    wanted, tensors = held_out(config(tmp_path / "one", data, **wide))
    assert [step for step, values in wanted.items() if values] == [3, 6]
    _, plain = held_out(config(tmp_path / "plain", data, **wide, evaluation=None))
    assert all(torch.equal(value, plain[name]) for name, value in tensors.items())
    both = [
        config(tmp_path / f"{stage}{bool(more)}", data, **wide, workers=2, zero={"stage": stage}, **more)
        for stage in (2, 3)
        for more in ({}, {"evaluation": None})
    ]
    ranks = run_ranks(run_all, 2, tmp_path, both)[0]
    for (losses, sharded), (_, without) in (ranks[:2], ranks[2:]):
        for step in (3, 6):
            assert losses[step] == pytest.approx(wanted[step], abs=1e-5)
        assert all(torch.equal(value, without[name]) for name, value in sharded.items())


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(lr: float, data: Data, tmp_path: Path) -> None:
    """At the lower rate the training loss would have it otherwise; at the higher one the best is not the last."""
    kept = {"every": 2, "keep": 1, "keep_best": True}
    made = config(
        tmp_path,
        data,
        steps=10,
        ema_decay=None,
        optimizer={"lr": lr, "warmup_steps": 0, "schedule": "constant"},
        checkpoint=kept,
        evaluation={"input": data.held, "every": 100, "rows": 13},
    )
    numbers = run_of(made)[0].numbers
    held = {step: values["eval_loss"] for step, values in numbers.items() if "eval_loss" in values}
    trained = {step: numbers[step - 1]["loss"] + numbers[step]["loss"] for step in held}
    assert list(held) == [2, 4, 6, 8, 10]  # with every checkpoint
    best = min(held, key=lambda step: held[step])
    assert {int(path.name[5:]) for path in Path(made.output).glob("step-*")} == {best, 10}
    assert best != min(trained, key=lambda step: trained[step])
    found = newest(Path(made.output))
    assert found is not None
    assert found.state["eval_loss"] == held[10]


def test_shards_of_another_kind_are_refused(data: Data, tmp_path: Path) -> None:
    other = tiny.write_tokens(
        tmp_path / "other", tiny.write_shards(tmp_path / "s", 16), data.encoders, resolution=16, low_resolution=8
    )
    made = config(tmp_path, data, evaluation={"input": other})
    said = r"evaluation.input: .* holds grids, codes and text tokens of \(\(4, 4\)"
    with pytest.raises(UserError, match=said):
        run_of(made)
    with pytest.raises(UserError, match=said):
        opened(made)  # before a worker starts


def test_shards_of_equal_shapes_that_other_parts_encoded_are_refused(data: Data, tmp_path: Path) -> None:
    others = retrained(tmp_path / "others", data.encoders, "vqvae")
    held = tiny.write_tokens(tmp_path / "held", tiny.write_shards(tmp_path / "s", 16), others)
    with pytest.raises(UserError, match=r"evaluation.input: .* was encoded by another VQGAN than"):
        opened(config(tmp_path, data, evaluation={"input": held}))
    both = retrained(tmp_path / "both", others, "text_encoder")
    held = tiny.write_tokens(tmp_path / "more", str(tmp_path / "s"), both)
    with pytest.raises(UserError, match=r"was encoded by another VQGAN and another text encoder than"):
        opened(config(tmp_path, data, evaluation={"input": held}))


def test_a_super_resolutions_held_out_low_ids_are_of_its_grid(data: Data, tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "s", 16)
    low = tiny.write_tokens(tmp_path / "low", shards, data.encoders, low_resolution=8)
    made = tiny.superres_config(tmp_path, data.tokens, evaluation={"input": low})
    with pytest.raises(
        UserError, match=r"of \(\(8, 8\), 32, 24, \(2, 2\), 32\), and the training \(\(8, 8\), 32, 24, \(4, 4\)"
    ):
        opened(made)


def retrained(folder: Path, encoders: str, part: str) -> str:
    """The encoders with other weights, of the same shapes, in one part."""
    shutil.copytree(encoders, folder)
    for path in (folder / part).glob("*.safetensors"):
        save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, {"format": "pt"})
    return str(folder)


# --- prompts


def sheet(config: TrainConfig) -> np.ndarray:
    picture = run_of(config)[0].pictures[config.steps]
    assert isinstance(picture, Image.Image)
    return np.asarray(picture)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_users_prompts_are_drawn(guidance: float, data: Data, tmp_path: Path) -> None:
    drawn = {"vqgan": data.encoders, "text_encoder": data.encoders, "steps": 2, "evaluation": None}
    sampling = {"steps": 3, "guidance": guidance, "temperature": 0.5}
    prompts = ["a large red circle", "a blue star", ""]
    first, again, other = (
        sheet(config(tmp_path / name, data, **drawn, samples={"prompts": asked, "sampling": sampling}))
        for name, asked in {"one": prompts, "two": prompts, "three": prompts[:1]}.items()
    )
    assert first.shape == (2 * tiny.SIDE, 3 * 2 * tiny.SIDE, 3)
    assert np.array_equal(first, again)
    assert np.array_equal(other, first[:, : 2 * tiny.SIDE])


def test_a_super_resolution_draws_over_what_a_base_draws(data: Data, tmp_path: Path) -> None:
    asked = {"prompts": ["a large red circle", "a blue star"], "sampling": {"steps": 3, "guidance": 2.0}}
    more = {"vqgan": data.encoders, "text_encoder": data.encoders, "samples": {**asked, "base": data.model}}
    made = tiny.superres_config(tmp_path, data.tokens, steps=2, **more)
    assert sheet(made).shape == (2 * tiny.SIDE, 2 * 2 * tiny.SIDE, 3)


def test_guided_samples_of_the_datas_own_captions(data: Data, tmp_path: Path) -> None:
    made = config(tmp_path, data, vqgan=data.encoders, steps=2, samples={"sampling": {"steps": 2, "guidance": 4.0}})
    assert sheet(made).shape == (2 * 2 * tiny.SIDE, 16 * 2 * tiny.SIDE, 3)


def test_all_that_cannot_be_drawn_is_said_before_any_work(data: Data, tmp_path: Path) -> None:
    other = retrained(tmp_path / "other", data.encoders, "text_encoder")
    vqgan = tiny.write_encoders(tmp_path / "vqgan", tiny.write_shards(tmp_path / "s", 32), codes=16)
    base = tiny.write_model(tmp_path / "base", data.encoders, codebook_size=16)
    held = tiny.write_tokens(tmp_path / "held", str(tmp_path / "s"), data.encoders, low_resolution=8)
    asked = {"prompts": ["a blue star"], "base": base}
    made = tiny.superres_config(
        tmp_path, data.tokens, vqgan=vqgan, text_encoder=other, samples=asked, evaluation={"input": held}
    )
    with pytest.raises(ConfigError, match="train-superres: 4 problems") as caught:
        opened(made)
    held_out, drawer, reader, low = caught.value.problems
    assert held_out.startswith("evaluation.input: ")
    assert "/vqgan has 16 codes, and image_ids of" in drawer
    assert "samples.prompts: the text encoder of" in reader
    assert "samples.base: " in low
    assert "codebook_size is 16 and must be 32" in low
    assert not list(Path(made.output).glob("step-*"))


def test_prompts_of_another_length_than_the_captions_are_refused_at_the_start(data: Data, tmp_path: Path) -> None:
    short = tiny.write_tokens(tmp_path / "short", tiny.write_shards(tmp_path / "s", 16), data.encoders, text_length=16)
    drawn = {"vqgan": data.encoders, "text_encoder": data.encoders, "samples": {"prompts": ["a"]}}
    made = tiny.base_config(tmp_path, short, ids="image_ids", **drawn)
    with pytest.raises(ConfigError, match="makes 24 tokens a caption, and the token shards hold 16"):
        opened(made)


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("train-base", {"samples": {"prompts": ["a"]}}, "to read and draw them, set vqgan and text_encoder as well"),
        (
            "train-superres",
            {"samples": {"prompts": ["a"]}, "vqgan": "v", "text_encoder": "t"},
            "set samples.base, which draws their low-res ids",
        ),
        ("train-base", {"samples": {"sampling": {"order": "critic"}}}, "samples have no critic"),
        ("train-base", {"samples": {"sampling": {"decode": "mean"}}}, "samples show the codes that are drawn"),
        ("train-base", {"evaluation": {"input": "x", "mask_ratios": [0.0]}}, "must be above 0.0, was 0.0"),
    ],
)
def test_what_cannot_be_shown_is_said_at_once(stage: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_values(stage, {"input": "x", "output": "y", "steps": 1, **changes})
