"""What a VQGAN's training can do beside its plain loss: adversary, LPIPS, growing crops, the decoder alone."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import tiny
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import load
from raymuse.config.training import VqganConfig
from raymuse.models.vqgan import Vqgan
from raymuse.models.vqmodel import VqModelConfig
from raymuse.storage.checkpoint import newest
from raymuse.training.build import build_task
from raymuse.training.fidelity import psnr, ssim
from raymuse.training.inputs import data_fingerprint
from raymuse.training.vqgan import VqganTask
from trainings import losses_of

ADVERSARY = {"start": 5, "channels": 8, "layers": 2}


@dataclass(frozen=True)
class Data:
    """Folders of tiny shards and of encoders, and files of VGG16's and LPIPS' shapes."""

    shards: str
    encoders: str
    vgg: str
    linear: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    torch.save(tiny.vgg_state(), root / "vgg.pth")
    torch.save(tiny.linear_state(), root / "linear.pth")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    return Data(shards, encoders, str(root / "vgg.pth"), str(root / "linear.pth"))


def fit(config: VqganConfig, stop_at: int | None = None) -> list[float]:
    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == stop_at:
            raise InterruptedError

    return losses_of(config, build_task(config), report)


def every_step(root: Path, data: Data, **changes: Any) -> VqganConfig:
    return tiny.vqgan_config(root, data.shards, **{"log_every": 1, **changes})


def examples(data: Data, root: Path) -> NDArray[np.uint8]:
    return VqganTask(every_step(root, data))._examples(48)


def weights(folder: str) -> dict[str, Tensor]:
    return Vqgan.load(folder).network.state_dict()


# --- the adversary


def test_an_adversary_changes_nothing_before_its_first_step(data: Data, tmp_path: Path) -> None:
    plain = fit(every_step(tmp_path / "plain", data, steps=9))
    against = fit(every_step(tmp_path / "against", data, steps=9, adversarial=ADVERSARY))
    assert against[:5] == plain[:5]
    assert against[5] == pytest.approx(plain[5], abs=1e-6)  # its say is weighed first
    assert all(one != other for one, other in zip(against[6:], plain[6:], strict=True))


def test_its_figures_are_logged_and_its_tensors_kept(data: Data, tmp_path: Path) -> None:
    config = every_step(tmp_path, data, steps=8, adversarial={**ADVERSARY, "loss": "vanilla"}, precision="bf16")
    task = VqganTask(config)
    losses_of(config, task)
    batch = task.batch(np.arange(64, 72), np.ones(8, np.float32))
    _, metrics = task.module(batch)
    assert {"mse", "adversarial", "discriminator"} == set(metrics)
    assert 0 < float(metrics["discriminator"]) / 8 < 3
    found = newest(Path(config.output))
    assert found is not None
    kept = {name for name in found.tensors() if name.startswith("extra/adversary/")}
    assert len(kept) == 2 + 3 * len(list(task.module.adversary.network.parameters()))  # type: ignore[union-attr]
    assert not any("adversary" in name for name in weights(f"{config.output}/model"))


# --- LPIPS


def test_lpips_is_added_by_its_weight(data: Data, tmp_path: Path) -> None:
    files = {"vgg": data.vgg, "lpips": data.linear}
    plain, seeing = (VqganTask(every_step(tmp_path, data, perceptual=p)) for p in (None, {**files, "weight": 0.5}))
    batch = plain.batch(np.arange(4), np.array([1, 1, 1, 0], np.float32))
    loss, _ = plain.module(batch)
    seen, metrics = seeing.module(batch)
    loss, seen = loss.detach(), seen.detach()
    with torch.no_grad():
        drawn = seeing.network.draw(seeing.network.latents(batch["pixels"]))
        assert seeing.module.lpips is not None
        distances = seeing.module.lpips(drawn, batch["pixels"])
    assert float(metrics["lpips"]) == pytest.approx(float(distances[:3].sum()), rel=1e-5)
    assert float(seen) == pytest.approx(float(loss) + 0.5 * float(distances[:3].sum()), rel=1e-5)
    trained = [name for name, parameter in seeing.module.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in plain.module.named_parameters() if parameter.requires_grad]


def test_a_training_that_looks_resumes_and_knows_its_files(data: Data, tmp_path: Path) -> None:
    changes = {"perceptual": {"vgg": data.vgg}, "adversarial": {**ADVERSARY, "start": 1}, "steps": 4, "batch_size": 4}
    straight, broken = (
        every_step(tmp_path / name, data, checkpoint={"every": 2, "keep": 2}, **changes) for name in ("one", "two")
    )
    losses = fit(straight)
    assert len(losses) == 4
    with pytest.raises(InterruptedError):
        fit(broken, stop_at=2)
    assert fit(broken) == losses[2:]
    other = every_step(tmp_path, data, perceptual={"vgg": data.linear})
    prints = [data_fingerprint(config) for config in (straight, other, every_step(tmp_path, data))]
    assert len(set(prints)) == 3
    with pytest.raises(UserError, match=r"nowhere.pth is no file on this machine"):
        data_fingerprint(every_step(tmp_path, data, perceptual={"vgg": "nowhere.pth"}))


# --- the decoder alone, and going on


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_decoder_alone_learns_and_every_id_stays(precision: str, data: Data, tmp_path: Path) -> None:
    config = every_step(
        tmp_path,
        data,
        start_from=data.encoders,
        train="decoder",
        steps=20,
        precision=precision,
        ema_decay=0.8,
        adversarial=ADVERSARY,
        checkpoint={"every": 10, "keep": 2},
    )
    pixels = examples(data, tmp_path)
    before = Vqgan.load(data.encoders)
    ids = before.encode(pixels)
    with pytest.raises(InterruptedError):
        fit(config, stop_at=10)
    fit(config)
    after = Vqgan.load(f"{config.output}/model")
    assert np.array_equal(after.encode(pixels), ids)
    assert len(np.unique(ids)) > 8
    old, new = before.network.state_dict(), after.network.state_dict()
    changed = {name.split(".")[0] for name, value in old.items() if not torch.equal(new[name], value)}
    assert changed == {"decoder", "post_quant_conv"}
    assert psnr(pixels, after.decode(ids)) > psnr(pixels, before.decode(ids)) + 0.5


def test_the_decoder_alone_ends_with_the_same_bits_and_reports_usage(data: Data, tmp_path: Path) -> None:
    changes = {"start_from": data.encoders, "train": "decoder", "steps": 6, "checkpoint": {"every": 3, "keep": 2}}
    straight, broken = (every_step(tmp_path / name, data, **changes) for name in ("one", "two"))
    losses = fit(straight)
    with pytest.raises(InterruptedError):
        fit(broken, stop_at=3)
    assert fit(broken) == losses[3:]
    wanted, found = (newest(Path(config.output)) for config in (straight, broken))
    assert wanted is not None
    assert found is not None
    tensors = found.tensors()
    assert [name for name, value in wanted.tensors().items() if not torch.equal(tensors[name], value)] == []
    assert {name.split(".")[1] for name in tensors if name.startswith("weight/")} == {"decoder", "post_quant_conv"}
    task = VqganTask(straight)
    task.module(task.batch(np.arange(8), np.ones(8, np.float32)))
    ids = torch.cat(task.module.ids)
    share = torch.bincount(ids).double() / len(ids)
    entropy = -sum(float(p) * math.log(float(p)) for p in share if p > 0)
    care = task._codebook_care(0, torch.cat(task.module.latents), ids)
    assert care["codebook_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert 0 < care["codebook_usage"] <= 1


def test_a_whole_vqgan_goes_on_with_its_own_codes(data: Data, tmp_path: Path) -> None:
    config = every_step(tmp_path, data, start_from=data.encoders, model={}, revive_below=0.0)
    task = VqganTask(config)
    assert task.module.quantise
    old = weights(data.encoders)
    assert all(torch.equal(value, old[name]) for name, value in task.network.state_dict().items())
    losses_of(config, task)
    new = weights(f"{config.output}/model")
    assert {name.split(".")[0] for name in old if not torch.equal(new[name], old[name])} == {
        *("encoder", "quant_conv", "quantize", "post_quant_conv", "decoder")
    }
    assert data_fingerprint(config) != data_fingerprint(every_step(tmp_path, data))


# --- crops, reports, refusals


def test_crops_grow_in_equal_shares_of_the_steps(data: Data, tmp_path: Path) -> None:
    task = VqganTask(every_step(tmp_path, data, curriculum=(8, 16), crop=32, resolutions=(32,), steps=9, batch_size=2))
    sides = [
        task.batch(np.arange(2 * step, 2 * step + 2), np.ones(2, np.float32))["pixels"].shape[-1] for step in range(9)
    ]
    assert sides == [8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert len(losses_of(task.config, task)) == 9


def test_the_trained_model_is_reported_by_its_fidelity_and_codes(data: Data, tmp_path: Path) -> None:
    config = every_step(tmp_path, data)
    task = VqganTask(config)
    losses_of(config, task)
    facts = task.save({}, tmp_path / "again")
    vqgan, pixels = Vqgan.load(str(tmp_path / "again")), examples(data, tmp_path)
    ids = vqgan.encode(pixels)
    share = np.unique(ids, return_counts=True)[1] / ids.size
    assert facts == pytest.approx(
        {
            "psnr": psnr(pixels, vqgan.decode(ids)),
            "ssim": ssim(pixels, vqgan.decode(ids)),
            "codebook_used": len(share) / tiny.CODES,
            "codebook_perplexity": math.exp(-(share * np.log(share)).sum()),
        },
        rel=1e-5,
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "late": ({"adversarial": {**ADVERSARY, "start": 12}}, "adversarial.start=12 is not below steps=12"),
    "small": ({"adversarial": {"start": 1, "layers": 3}}, "crop=16 is below the 24 pixels that adversarial.layers=3"),
    "first": ({"curriculum": (12,), "adversarial": {**ADVERSARY, "layers": 3}, "crop": 32, "resolutions": (32,)},
              "curriculum=12 is below the 24 pixels that adversarial.layers=3 needs"),
    "odd": ({"curriculum": (10,)}, "curriculum=10 is no multiple of the VQGAN's factor 4"),
    "large": ({"curriculum": (32,)}, "resolutions=16 is below curriculum=32"),
    "blind": ({"curriculum": (8,), "perceptual": {"vgg": "vgg.pth"}}, "curriculum=8 is below the 16 pixels that"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_recipe_that_cannot_work_is_a_config_error(case: str, data: Data, tmp_path: Path) -> None:
    changes, complaint = WRONG[case]
    with pytest.raises(ConfigError, match="train-vqgan: 1 problem") as caught:
        build_task(every_step(tmp_path, data, **changes))
    assert complaint in str(caught.value)


def test_prices_need_a_vqgan_with_a_place_for_them(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rate_weight=0.5: .* was trained without, and has no place for prices"):
        build_task(every_step(tmp_path, data, start_from=data.encoders, rate_weight=0.5))
    decoder = every_step(tmp_path, data, start_from=data.encoders, train="decoder", rate_weight=0.5)
    assert isinstance(build_task(decoder), VqganTask)  # its codes are not touched


def test_a_decoder_of_nothing_and_a_sign_that_is_none_are_refused() -> None:
    said = [
        ("train=decoder", "train: decoder needs start_from, the VQGAN whose ids stay as they are"),
        ("adversarial.channels=12", "adversarial.start: missing"),
        ("adversarial={start: 1, loss: wgan}", "adversarial.loss: must be 'hinge' or 'vanilla'; was 'wgan'"),
        ("perceptual.weight=1", "perceptual.vgg: missing"),
    ]
    for override, sentence in said:
        with pytest.raises(ConfigError) as caught:
            load("demo:vqgan", [override])
        assert sentence in str(caught.value)


@pytest.mark.parametrize(("name", "factor"), [("vqgan-f16", 16), ("vqgan-f8", 8)])
def test_the_shipped_shapes_are_those_of_their_names(name: str, factor: int) -> None:
    config = load(name)
    assert isinstance(config, VqganConfig)
    shape = VqModelConfig(**config.model)
    assert shape.factor == factor
    assert (shape.num_vq_embeddings, shape.latent_channels) == (8192, 64)
    assert all(side % factor == 0 for side in (*config.curriculum, config.crop, *config.resolutions))
    assert config.adversarial is not None
    assert config.adversarial.start < config.steps
    decoder = load("vqgan-decoder")
    assert isinstance(decoder, VqganConfig)
    assert (decoder.train, decoder.start_from) == ("decoder", "hf://amused/amused-256")
