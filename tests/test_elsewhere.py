"""Trainings, drawing and encoding on a device that is not the CPU: nothing is left behind, and all is as on the CPU."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from elsewhere import ELSEWHERE, elsewhere
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.training import CriticConfig, TrainConfig
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models.clip import Clip
from raymuse.pipeline import Pipeline
from raymuse.storage.images import list_shards
from raymuse.training.build import build_task
from trainings import losses_of

TWO = {"steps": 2, "log_every": 1, "sample_every": 2, "checkpoint": {"every": 2}}


@dataclass(frozen=True)
class Data:
    shards: str
    encoders: str
    states: str
    ids: str
    model: str
    cascade: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards", count=16)
    encoders = tiny.write_encoders(root, shards)
    states, ids = (tiny.write_tokens(root / text, shards, encoders, text=text) for text in ("states", "ids"))
    model, cascade = (tiny.write_model(root / str(high), encoders, cascade=high) for high in (False, True))
    return Data(shards, encoders, states, ids, model, cascade)


def base(root: Path, data: Data, **changes: Any) -> TrainConfig:
    """With everything beside its loss: samples from prompts, a held-out loss, an average, recomputation."""
    samples = {"prompts": ("a red circle",), "sampling": {"steps": 2, "guidance": 2.0}}
    beside = {"samples": samples, "vqgan": data.encoders, "text_encoder": data.encoders, "ema_decay": 0.9}
    held_out = {"input": data.states, "every": 1, "rows": 8}
    other = {"unmasked_weight": 0.1, "rectangle_share": 0.5, "gradient_checkpointing": True}
    return tiny.base_config(root, data.states, **{**TWO, **beside, **other, "evaluation": held_out, **changes})


def muse(root: Path, data: Data) -> TrainConfig:
    shape = {**tiny.MASKGIT, "self_conditioning": True, "self_critic": True}
    return tiny.base_config(root, data.states, **TWO, vqgan=data.encoders, architecture="maskgit", model=shape)


def superres(root: Path, data: Data) -> TrainConfig:
    return tiny.superres_config(root, data.states, **TWO, vqgan=data.encoders, optimizer={"name": "muon"})


def lora(root: Path, data: Data) -> TrainConfig:
    """Of a model's base and of the text encoder, which then reads ids in every step."""
    of = {
        "ids": "image_ids",
        "start_from": data.model,
        "model": {},
        "text_encoder": data.encoders,
        "vqgan": data.encoders,
    }
    return tiny.base_config(root, data.ids, **TWO, **of, lora={"rank": 2, "text_targets": ("q_proj",)})


def critic(root: Path, data: Data) -> TrainConfig:
    plain = tiny.base_config(root, data.states, **TWO, ids="image_ids").model_dump()
    own = {name: value for name, value in plain.items() if name in CriticConfig.model_fields}
    return CriticConfig(**{**own, "stage": "train-critic", "base": data.model})


def vqgan(root: Path, data: Data) -> TrainConfig:
    against = {"resolutions": (32,), "crop": 32, "adversarial": {"start": 1}}
    return tiny.vqgan_config(root, data.shards, **{**TWO, **against}, warm_steps=1, ema_decay=0.9)


def clip(root: Path, data: Data) -> TrainConfig:
    return tiny.clip_config(root, data.shards, **TWO)


@pytest.mark.parametrize("kind", [base, muse, superres, lora, critic, vqgan, clip], ids=lambda kind: kind.__name__)
def test_a_training_elsewhere_has_the_losses_of_one_here(
    kind: Callable[[Path, Data], TrainConfig], data: Data, tmp_path: Path
) -> None:
    here = kind(tmp_path / "here", data)
    wanted = losses_of(here, build_task(here))
    there = kind(tmp_path / "there", data)
    with elsewhere():
        task = build_task(there, ELSEWHERE)
        losses = losses_of(there, task, device=ELSEWHERE)
    assert {p.device.type for p in task.module.parameters()} == {ELSEWHERE}
    # Attention takes another kernel there, whose rounding gives a latent or two of the VQGAN's another id.
    assert losses == pytest.approx(wanted, abs=2e-3 if kind is vqgan else 1e-5)
    if kind is not critic:  # which draws no samples
        one, other = (np.asarray(Image.open(Path(each.output) / "samples.png"), np.int16) for each in (here, there))
        assert np.abs(one - other).max() <= (255 if kind is vqgan else 1)


def drawn(model: str, encoders: str, device: str, decode: str) -> list[np.ndarray]:
    """A picture from a prompt and one inpainted, with its negative prompt, and what CLIP makes of them."""
    pipeline = Pipeline.load(model, device=device, batch_size=2)
    prompts = ["a red circle", "a small blue star"]
    first = pipeline(prompts, seeds=[1, 2], negative="green", decode=decode).pixels
    masks = [np.eye(len(first[0]), dtype=bool)] * 2
    second = pipeline.edit("inpaint", prompts, list(first), masks=masks, seeds=[3, 4]).pixels
    scorer = Clip.load(encoders, device)
    return [first, second, scorer.texts(prompts).numpy()]


@pytest.mark.parametrize("decode", ["drawn", "mean"])
def test_pictures_drawn_elsewhere_are_those_drawn_here(decode: str, data: Data) -> None:
    here = drawn(data.cascade, data.encoders, "cpu", decode)
    with elsewhere():
        there = drawn(data.cascade, data.encoders, ELSEWHERE, decode)
    for one, other, most in zip(here, there, (1, 1, 1e-5), strict=True):
        assert np.abs(one.astype(np.float64) - other).max() <= most


def test_tokens_encoded_elsewhere_are_those_encoded_here(data: Data) -> None:
    of = {"input": data.shards, "output": "unused", "vqgan": data.encoders, "text_encoder": data.encoders}
    config = PretokenizeConfig(**of, resolution=tiny.SIDE, low_resolution=tiny.LOW_SIDE, chunk_size=16)
    (chunk,) = decode_chunks(list_shards(data.shards)[0], config)
    here = ChunkEncoder(config)(chunk)
    with elsewhere():
        there = ChunkEncoder(config, ELSEWHERE)(chunk)
    assert there.tokens.equals(here.tokens)
    for name in ("text_states", "pooled"):
        one, other = (np.stack(each.captions[name].to_pylist()) for each in (here, there))
        np.testing.assert_allclose(one, other, atol=2e-3)  # of fp16


def test_a_tensor_left_on_the_cpu_is_told() -> None:
    with elsewhere():
        there = torch.ones(3).to(ELSEWHERE)
        assert (there + 1).device.type == ELSEWHERE
        with pytest.raises(RuntimeError, match="elsewhere and on the CPU"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
