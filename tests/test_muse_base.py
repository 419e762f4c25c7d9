"""Muse's base where aMUSEd's stands: trained, sampled, styled, judged, exported, refused by what has none."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.export import ExportConfig
from raymuse.config.training import CriticConfig, TrainConfig
from raymuse.drawing.golden import verify
from raymuse.drawing.tasks import UNKNOWN
from raymuse.models.maskgit import MaskGit
from raymuse.models.text import T5Text
from raymuse.models.uvit import UVit
from raymuse.pipeline import Pipeline
from raymuse.stages.export import export
from raymuse.tracking.run import Run
from raymuse.training.build import build_task
from tiny_t5 import WIDTH, encoder_only, write_t5
from trainings import fit, losses_of

PROMPTS = ["a red circle", "a small blue star", "a green square", "", "a large red star", "a circle", "two stars"]
SEEDS = list(range(40, 47))


@dataclass(frozen=True)
class Data:
    """Folders: encoders, token shards, a model folder with Muse's base and one with aMUSEd's."""

    encoders: str
    tokens: str
    model: str
    uvit: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("muse")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    model = tiny.write_model(root / "model", encoders, muse=True)
    return Data(encoders, tokens, model, tiny.write_model(root / "uvit", encoders))


def config(root: Path, data: Data, **changes: Any) -> TrainConfig:
    values = {"ids": "image_ids", "architecture": "maskgit", "model": tiny.MASKGIT, "log_every": 1}
    return tiny.base_config(root, data.tokens, **{**values, "checkpoint": {"every": 6}, **changes})


@pytest.fixture(scope="module")
def pipeline(data: Data) -> Pipeline:
    return Pipeline.load(data.model, batch_size=4)


# --- training


def test_a_restart_and_checkpointing_change_nothing(data: Data, tmp_path: Path) -> None:
    losses, tensors = fit(config(tmp_path / "one", data, ema_decay=0.9))
    broken = config(tmp_path / "broken", data, ema_decay=0.9, gradient_checkpointing=True)

    def lost(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        losses_of(broken, build_task(broken), lost)
    again, resumed = fit(broken)
    assert again == losses[6:]
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, resumed[name]) for name, value in tensors.items())


def test_what_was_trained_starts_the_next_and_makes_a_model_folder(data: Data, tmp_path: Path) -> None:
    trained = config(tmp_path, data, vqgan=data.encoders, text_encoder=data.encoders)
    task = build_task(trained)
    losses_of(trained, task)
    assert task.sample(dict(task.module.named_parameters())) is not None
    Path(trained.output, "_SUCCESS").touch()
    parts = {"vqgan": f"{data.encoders}/vqvae", "text_encoder": data.encoders}
    folder = export(ExportConfig(output=str(tmp_path / "model"), base=trained.output, **parts), Run.off())
    record = json.loads(Path(folder, "transformer/config.json").read_text())
    assert (record["_class_name"], record["sample_size"]) == ("MaskGit", 8)
    drawn = Pipeline.load(folder)(["a red circle"], seeds=[1])
    assert drawn.images[0].size == (tiny.SIDE, tiny.SIDE)
    more = build_task(config(tmp_path / "more", data, start_from=folder, architecture="uvit"))
    started = dict(more.module.network.named_parameters())
    saved = dict(Pipeline.load(folder).base.named_parameters())
    assert all(torch.equal(value, started[name]) for name, value in saved.items())


def test_a_lora_of_it_changes_its_pictures(data: Data, pipeline: Pipeline, tmp_path: Path) -> None:
    trained = config(tmp_path, data, start_from=data.model, lora={"rank": 2}, optimizer={"lr": 0.1})
    losses_of(trained, build_task(trained))
    styled = pipeline.styled({f"{trained.output}/model": 1.0})
    assert not np.array_equal(styled(PROMPTS, seeds=SEEDS).ids, pipeline(PROMPTS, seeds=SEEDS).ids)


def test_a_critic_of_it_is_like_it_and_orders_its_pictures(data: Data, pipeline: Pipeline, tmp_path: Path) -> None:
    plain = tiny.base_config(tmp_path, data.tokens, ids="image_ids", steps=3, model={})
    values = {**plain.model_dump(), "stage": "train-critic", "base": data.model, "output": str(tmp_path / "critic")}
    own = {name: value for name, value in values.items() if name in CriticConfig.model_fields}
    critic = CriticConfig.model_validate(own)
    losses_of(critic, build_task(critic))
    Path(critic.output, "_SUCCESS").touch()
    parts = {"vqgan": data.model, "text_encoder": data.model, "base": data.model, "critic": critic.output}
    judged = Pipeline.load(export(ExportConfig(output=str(tmp_path / "judged"), **parts), Run.off()), batch_size=4)
    assert isinstance(judged.critic, MaskGit)
    together = judged(PROMPTS, seeds=SEEDS, order="critic").ids
    assert not np.array_equal(together, judged(PROMPTS, seeds=SEEDS).ids)


# --- sampling


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    together = pipeline(PROMPTS, seeds=SEEDS, negative="a star").ids
    for number in (0, 3, 5):
        alone = pipeline([PROMPTS[number]], seeds=[SEEDS[number]], negative="a star")
        assert np.array_equal(alone.ids[0], together[number])
    turned = pipeline(PROMPTS[::-1], seeds=SEEDS[::-1], negative="a star").ids
    assert np.array_equal(turned[::-1], together)
    assert len({ids.tobytes() for ids in together}) == len(PROMPTS)


def test_prompts_steps_and_known_ids_are_heard(pipeline: Pipeline) -> None:
    one, other = (pipeline([prompt], seeds=[1]).ids for prompt in ("a red circle", "two blue stars"))
    assert not np.array_equal(one, other)
    known = np.full((1, 8, 8), UNKNOWN)
    known[0, :4] = 7
    ids = pipeline(["a red circle"], seeds=[1], ids=known, steps=2).ids
    assert (ids[0, :4] == 7).all()
    assert (ids >= 0).all()
    small = pipeline(["a red circle"], seeds=[1], size=(16, 24)).images[0]
    assert small.size == (16, 24)


def test_packed_linears_draw_the_same(pipeline: Pipeline) -> None:
    drawn = pipeline.packed()(PROMPTS, seeds=SEEDS, temperature=0, top_k=1).ids
    assert np.mean(drawn == pipeline(PROMPTS, seeds=SEEDS, temperature=0, top_k=1).ids) > 0.98


# --- the folder, and what does not fit


def test_diffusers_refuses_the_folder(data: Data) -> None:
    from diffusers import AmusedPipeline, DiffusionPipeline

    record = json.loads(Path(data.model, "model_index.json").read_text())
    assert record == {"_class_name": "RaymusePipeline"}
    assert not Path(data.model, "scheduler").exists()
    for kind in (AmusedPipeline, DiffusionPipeline):
        with pytest.raises((ValueError, AttributeError, OSError)):
            kind.from_pretrained(data.model)


def test_what_it_cannot_do_is_refused(data: Data, pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has learned the positions of at most 32 a side"):
        pipeline(["a red circle"], seeds=[1], size=(36, 32))
    with pytest.raises(UserError, match="cannot leave out a caption's padding"):
        Pipeline.load(data.model, attention="flash")
    with pytest.raises(UserError, match="a MaskGit of 32 px: published values exist"):
        verify(pipeline.text, pipeline.base, pipeline.vqgan)
    with pytest.raises(ConfigError, match=r"model\.num_res_blocks: no such field; it has codebook_size"):
        build_task(config(tmp_path, data, model=tiny.UVIT))
    small = tiny.write_model(tmp_path / "small", data.encoders, muse=True, sample_size=4)
    with pytest.raises(UserError, match="positions is 4 and must be at least 8"):
        build_task(config(tmp_path, data, start_from=small))
    Path(small, "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"has no generation_config\.json"):
        Pipeline.load(small)


# --- text from T5


@pytest.mark.parametrize(("architecture", "text"), [("maskgit", "states"), ("uvit", "ids")])
def test_captions_read_by_a_t5_train_and_draw(
    architecture: str, text: str, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From a folder as T5's repositories lie: weights, pickles and tokenizer side by side."""
    root = tmp_path_factory.mktemp("t5")
    t5 = write_t5(root / "t5", encoder_only(), at_root=True)
    Path(t5, "pytorch_model.bin").touch()
    shards = tiny.write_shards(root / "shards")
    tokens = tiny.write_tokens(root / "tokens", shards, data.encoders, text_encoder=t5, text_length=20, text=text)
    shape = tiny.MASKGIT if architecture == "maskgit" else tiny.UVIT
    changes: dict[str, Any] = {"architecture": architecture, "model": shape, "text_encoder": t5}
    trained = config(root, Data(data.encoders, tokens, "", ""), **changes)
    task = build_task(trained)
    batch = task.batch(np.arange(8), np.ones(8, np.float32))
    assert batch["states"].shape == (8, 20, WIDTH)
    padded = (batch["states"] == 0).all(dim=-1)
    assert 0 < float(padded.float().mean()) < 1
    losses = losses_of(trained, task)
    assert losses[-1] < losses[0]
    Path(trained.output, "_SUCCESS").touch()
    parts = {"base": trained.output, "vqgan": f"{data.encoders}/vqvae", "text_encoder": t5}
    folder = Path(export(ExportConfig(output=str(root / "model"), **parts), Run.off()))
    assert not [path.name for path in folder.rglob("*.bin")]
    assert not list((folder / "tokenizer").glob("*.safetensors"))
    assert json.loads((folder / "model_index.json").read_text()) == {"_class_name": "RaymusePipeline"}
    assert "diffusers\nhas no such pipeline" in (folder / "README.md").read_text()
    pipeline = Pipeline.load(str(folder), batch_size=2)
    assert isinstance(pipeline.text, T5Text)
    together = pipeline(PROMPTS[:3], seeds=SEEDS[:3]).ids
    assert np.array_equal(pipeline([PROMPTS[2]], seeds=[SEEDS[2]]).ids[0], together[2])


# --- aMUSEd's way from 256 to 512 pixels


def test_a_u_vit_grows_down_and_up_sampling_and_keeps_its_weights(data: Data, tmp_path: Path) -> None:
    grow = {"start_from": data.uvit, "architecture": "uvit", "model": {"downsample": True, "upsample": True}}
    grown = config(tmp_path, data, **grow)
    task = build_task(grown)
    assert isinstance(task.module.network, UVit)
    before = dict(Pipeline.load(data.uvit).base.named_parameters())
    after = {name: p.detach().clone() for name, p in task.module.network.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name for name in after if name not in before}
    assert {name.rpartition(".")[0] for name in new} == {
        f"{side}.{part}" for side in ("down_block.downsample", "up_block.upsample") for part in ("norm", "conv")
    }
    assert all(p.requires_grad for p in task.module.network.parameters())
    losses = losses_of(grown, task)
    assert losses[-1] < losses[0]
    record = json.loads(Path(grown.output, "model/config.json").read_text())
    assert (record["downsample"], record["upsample"], record["sample_size"]) == (True, True, 8)


def test_growing_what_cannot_grow_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="downsample and upsample must be set together"):
        build_task(config(tmp_path, data, start_from=data.uvit, model={"downsample": True}))
    both = {"downsample": True, "upsample": True}
    with pytest.raises(ConfigError, match=r"model\.downsample: .* does not, and Muse's base has none"):
        build_task(config(tmp_path, data, start_from=data.model, model=both))
    with pytest.raises(ConfigError, match=r"model\.downsample: .* does not, and a LoRA adds no layers"):
        build_task(config(tmp_path, data, start_from=data.uvit, model=both, lora={"rank": 2}))
    grown = tiny.write_model(tmp_path / "grown", data.encoders, **both)
    with pytest.raises(ConfigError, match="down-samples, and that cannot be taken out"):
        build_task(config(tmp_path, data, start_from=grown, model={"downsample": False, "upsample": False}))
