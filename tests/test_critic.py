"""Token critics: they learn which ids a base drew, and order what sampling keeps."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.export import ExportConfig
from raymuse.config.training import CriticConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.drawing.tasks import UNKNOWN
from raymuse.masking import reveal
from raymuse.models.uvit import UVit
from raymuse.pipeline import Pipeline
from raymuse.stages.export import export
from raymuse.tracking.run import Run
from raymuse.training.build import build_task
from raymuse.training.critic import CriticTask
from raymuse.training.inputs import data_fingerprint
from trainings import Trained, fit, fit_all, losses_of

PROMPTS = ["a red circle", "a small blue star", "a green square", "", "a large red star", "a circle", "two stars"]
SEEDS = range(40, 47)


@dataclass(frozen=True)
class Data:
    """Folders: encoders, token shards, a base in a model folder, and that with a critic."""

    encoders: str
    tokens: str
    model: str
    judged: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("critic")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    model = tiny.write_model(root / "model", encoders)
    fit(config(root, tokens, model))
    (root / "critic" / "_SUCCESS").touch()
    judged = ExportConfig(
        output=str(root / "judged"),
        base=model,
        critic=str(root / "critic"),
        vqgan=f"{model}/vqvae",
        text_encoder=model,
    )
    return Data(encoders, tokens, model, export(judged, Run.off()))


def config(root: Path, tokens: str, base: str, **changes: Any) -> CriticConfig:
    plain = tiny.base_config(root, tokens, ids="image_ids", log_every=1, checkpoint={"every": 6}, model={})
    values = {**plain.model_dump(), "stage": "train-critic", "output": str(root / "critic"), "base": base}
    own = {name: value for name, value in values.items() if name in CriticConfig.model_fields}
    return CriticConfig.model_validate({**own, **changes})


@pytest.fixture(scope="module")
def pipeline(data: Data) -> Pipeline:
    return Pipeline.load(data.judged, batch_size=4)


def task_of(config: CriticConfig) -> CriticTask:
    task = build_task(config)
    assert isinstance(task, CriticTask)
    return task


# --- training


def test_a_critic_learns_which_ids_were_drawn(data: Data, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-2, "warmup_steps": 5}
    task = task_of(config(tmp_path, data.tokens, data.model, steps=120, batch_size=32, optimizer=optimizer))
    before = {name: value.clone() for name, value in task.module.base.state_dict().items()}
    losses = losses_of(task.config, task)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert all(torch.equal(value, before[name]) for name, value in task.module.base.state_dict().items())
    batch = task.batch(np.arange(90_000, 90_064), np.ones(64, np.float32))
    with torch.no_grad():
        _, metrics = task.module(batch)
    share = float(metrics["true_share"]) / task.count(batch)
    assert float(metrics["accuracy"]) / task.count(batch) > max(share, 1 - share) + 0.05


def test_it_is_shown_one_draw_of_the_base_where_ids_are_hidden(data: Data, tmp_path: Path) -> None:
    task = task_of(config(tmp_path, data.tokens, data.model))
    weights = np.ones(256, np.float32)
    weights[200:] = 0
    batch = task.batch(np.arange(256), weights)
    told = batch["states"], batch["pooled"], batch["micro"]
    filled = task.module._filled(batch, told)
    assert torch.equal(filled[~batch["mask"]], batch["ids"][~batch["mask"]])
    assert 0 <= int(filled[:200].min()) <= int(filled[:200].max()) < tiny.CODES
    with torch.no_grad():
        features = task.module.base.features(batch["ids"], task.module.base.condition(*told))
        wanted = task.module.base.head(features[batch["mask"]]).softmax(dim=-1).mean(dim=0)
    found = torch.bincount(filled[batch["mask"]], minlength=tiny.CODES) / int(batch["mask"].sum())
    assert float((found - wanted).abs().max()) < 0.02
    assert torch.equal(filled, task.module._filled(task.batch(np.arange(256), weights), told))
    assert task.count(batch) == 200 * 64
    known = {name: value[200:] for name, value in batch.items()}
    with torch.no_grad():
        assert float(task.module(known)[0]) == 0


def test_a_restart_and_the_world_change_nothing(data: Data, tmp_path: Path) -> None:
    losses, tensors = fit(config(tmp_path / "one", data.tokens, data.model))

    def lost(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == 6:
            raise InterruptedError

    broken = config(tmp_path / "broken", data.tokens, data.model)
    with pytest.raises(InterruptedError):
        losses_of(broken, build_task(broken), lost)
    again, resumed = fit(broken)
    assert again == losses[6:]
    assert all(torch.equal(value, resumed[name]) for name, value in tensors.items())
    assert not any("/base." in name for name in tensors)
    both = config(tmp_path / "two", data.tokens, data.model, workers=2, zero={"stage": 2})
    _, wanted_bits = fit(config(tmp_path / "one exact", data.tokens, data.model, exact_rows=3))
    exact = config(tmp_path / "exact", data.tokens, data.model, workers=2, zero={"stage": 2}, exact_rows=3)
    trained: list[Trained] = run_ranks(fit_all, 2, tmp_path, [both, exact])[0]
    assert trained[0][0] == pytest.approx(losses, abs=1e-5)
    bits = trained[1][1]
    assert bits.keys() == wanted_bits.keys()
    assert [name for name, value in wanted_bits.items() if not torch.equal(bits[name], value)] == []


# --- sampling


def test_what_the_critic_believes_is_kept() -> None:
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.full((2, 6), 9)
    ids[0, 2] = 3
    half = torch.full((2, 6), 0.5)
    belief = torch.tensor([[5.0, 4.0, -9.0, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    seen = []

    def critic(drawn: torch.Tensor) -> torch.Tensor:
        seen.append(drawn)
        return belief

    made = reveal(logits, ids, half, half, torch.tensor([3, 3]), torch.zeros(2), mask_id=9, critic=critic)
    assert (made == 9).tolist() == [[False, False, False, True, True, True], [True, True, True, False, False, False]]
    assert int(made[0, 2]) == 3
    assert int(seen[0].max()) < 5


def test_a_picture_ordered_by_a_critic_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    together = pipeline(PROMPTS, seeds=SEEDS, order="critic").ids
    for number in (0, 5):
        alone = pipeline(PROMPTS[number : number + 1], seeds=[SEEDS[number]], order="critic")
        assert np.array_equal(alone.ids[0], together[number])
    turned = pipeline(PROMPTS[::-1], seeds=list(SEEDS)[::-1], order="critic").ids
    assert np.array_equal(turned[::-1], together)
    assert not np.array_equal(together, pipeline(PROMPTS, seeds=SEEDS).ids)


def test_known_ids_stay(pipeline: Pipeline) -> None:
    known = np.full((1, 8, 8), UNKNOWN)
    known[0, :4] = 7
    ids = pipeline(["a red circle"], seeds=[1], ids=known, order="critic").ids
    assert (ids[0, :4] == 7).all()
    assert (ids >= 0).all()


def test_the_critic_is_the_only_thing_it_adds_to_the_folder(data: Data, pipeline: Pipeline) -> None:
    from diffusers import AmusedPipeline

    assert isinstance(pipeline.critic, UVit)
    plain = Pipeline.load(data.model, batch_size=4)
    settings = pipeline.settings.base.model_dump()
    assert np.array_equal(plain(PROMPTS, seeds=SEEDS, **settings).ids, pipeline(PROMPTS, seeds=SEEDS).ids)
    assert model_sha256(data.judged) != model_sha256(data.model)
    theirs = AmusedPipeline.from_pretrained(data.judged)
    assert theirs.transformer.config.codebook_size == tiny.CODES


# --- what does not fit


def test_a_model_without_a_critic_says_so(data: Data) -> None:
    with pytest.raises(UserError, match="this model has no critic/"):
        Pipeline.load(data.model, batch_size=4)(["a red circle"], seeds=[0], order="critic")


def test_settings_that_ask_for_a_critic_in_vain_are_refused_at_once(data: Data, tmp_path: Path) -> None:
    parts = {"base": data.model, "vqgan": data.model, "text_encoder": data.model}
    config = ExportConfig(output=str(tmp_path / "no"), **parts, base_sampling={"order": "critic"})
    with pytest.raises(UserError, match=r"is sampled with order: critic and has no critic/"):
        export(config, Run.off())
    cascade = tiny.write_model(tmp_path / "cascade", data.encoders, cascade=True)
    parts |= {"base": cascade, "superres": cascade, "critic": data.judged}
    config = ExportConfig(output=str(tmp_path / "neither"), **parts, superres_sampling={"order": "critic"})
    with pytest.raises(UserError, match="so superres_sampling has another order"):
        export(config, Run.off())


def test_a_critic_for_another_text_encoder_is_refused(data: Data, tmp_path: Path) -> None:
    shutil.copytree(data.judged, tmp_path / "model")
    other = tiny.write_model(tmp_path / "other", data.encoders, codebook_size=1, encoder_hidden_size=9)
    shutil.rmtree(tmp_path / "model" / "critic")
    shutil.copytree(f"{other}/transformer", tmp_path / "model" / "critic")
    with pytest.raises(UserError, match=r"critic/ does not belong to this VQGAN and text encoder: encoder_hidden_size"):
        Pipeline.load(str(tmp_path / "model"))


def test_what_cannot_be_trained_is_said_at_once(data: Data, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", data.encoders, codebook_size=7, vocab_size=71)
    with pytest.raises(UserError, match="codebook_size is 7 and must be 32"):
        build_task(config(tmp_path, data.tokens, other))
    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="half is not trained to the end"):
        build_task(config(tmp_path, data.tokens, str(tmp_path / "half")))
    with pytest.raises(UserError, match=r"draws a grid of 8, and low_ids of .* are 4 a side"):
        build_task(config(tmp_path, data.tokens, data.model, ids="low_ids"))
    one, two = (data_fingerprint(config(tmp_path, data.tokens, base)) for base in (data.model, other))
    assert one != two
