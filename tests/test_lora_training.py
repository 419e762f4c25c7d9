"""Training LoRAs: only they learn, a restart or another world changes nothing, and diffusers and peft open them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import tiny
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.training import TrainConfig
from raymuse.drawing.model_folder import load_base, load_superres
from raymuse.models import lora
from raymuse.models.lora import Adapter
from raymuse.models.superres import SuperRes
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit
from raymuse.pipeline import Pipeline
from raymuse.training.build import build_task
from raymuse.training.masked import MaskedTask
from trainings import fit, fit_all, losses_of

TEXT = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Data:
    """Folders: encoders, token shards with states and with text ids, a base alone, a cascade, shards twice as large."""

    encoders: str
    states: str
    ids: str
    model: str
    cascade: str
    large: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    states = tiny.write_tokens(root / "states", shards, encoders)
    ids = tiny.write_tokens(root / "ids", shards, encoders, text="ids")
    model = tiny.write_model(root / "model", encoders)
    large = tiny.write_tokens(root / "large", shards, encoders, resolution=64, low_resolution=32)
    return Data(encoders, states, ids, model, tiny.write_model(root / "cascade", encoders, cascade=True), large)


def base(root: Path, data: Data, text: tuple[str, ...] = (), **changes: Any) -> TrainConfig:
    adapter = {"rank": 4, "alpha": 8.0, "text_targets": text}
    values = {"ids": "image_ids", "start_from": data.model, "lora": adapter, "text_encoder": data.encoders}
    everything = {**values, "log_every": 1, "checkpoint": {"every": 6}, "model": {}, **changes}
    return tiny.base_config(root, data.ids if text else data.states, **everything)


def superres(root: Path, data: Data) -> TrainConfig:
    adapter = {"rank": 4, "targets": ("to_q", "to_out.0")}
    return tiny.superres_config(root, data.states, start_from=data.cascade, lora=adapter, model={})


def trained_task(config: TrainConfig) -> MaskedTask:
    task = build_task(config)
    losses_of(config, task)
    assert isinstance(task, MaskedTask)
    return task


def test_only_the_adapter_learns_and_it_starts_as_nothing(data: Data, tmp_path: Path) -> None:
    config = base(tmp_path, data, steps=60, optimizer={"lr": 3e-2, "warmup_steps": 3}, checkpoint={"every": 60})
    task = build_task(config)
    batch = task.batch(np.arange(64), np.ones(64, np.float32))
    full = build_task(base(tmp_path, data, lora=None))
    with torch.no_grad():
        before, _ = task.module(batch)
        assert float(before) == float(full.module(batch)[0])
    start = {name: value.clone() for name, value in task.module.state_dict().items()}
    losses_of(config, task)
    with torch.no_grad():
        assert float(task.module(batch)[0]) < 0.98 * float(before)
    changed = {name for name, value in task.module.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if ".lora_" in name}
    assert len(changed) == 2 * 3 * attentions(full.module.network)


def attentions(network: Any) -> int:
    return sum(name.endswith(".to_q") for name, _ in network.named_modules())


def test_a_lost_worker_costs_no_bit_of_the_adapter(data: Data, tmp_path: Path) -> None:
    straight, broken = (base(tmp_path / name, data, TEXT, ema_decay=0.9) for name in ("straight", "broken"))
    losses, tensors = fit(straight)

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if metrics["step"] == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        losses_of(broken, build_task(broken), report)
    again, resumed = fit(broken)
    assert again == losses[6:]
    assert tensors.keys() == resumed.keys()
    assert [name for name, value in tensors.items() if not torch.equal(value, resumed[name])] == []
    assert {key.rsplit(".", 3)[1] for key in tensors} == {"lora_A", "lora_B"}
    files = [Path(one.output, "model", lora.DIFFUSERS).read_bytes() for one in (straight, broken)]
    assert files[0] == files[1]


def test_the_world_changes_no_loss(data: Data, tmp_path: Path) -> None:
    """Two DeepSpeed ranks at ZeRO 2 and 3 beside one process."""
    wanted, weights = fit(base(tmp_path / "one", data, TEXT, steps=4, checkpoint={"every": 4}))
    configs = [
        base(tmp_path / str(zero), data, TEXT, steps=4, checkpoint={"every": 4}, workers=2, zero={"stage": zero})
        for zero in (2, 3)
    ]
    exact = {"steps": 4, "checkpoint": {"every": 4}, "exact_rows": 3}
    _, wanted_bits = fit(base(tmp_path / "one exact", data, TEXT, **exact))
    configs.append(base(tmp_path / "exact", data, TEXT, workers=2, zero={"stage": 2}, **exact))
    *trained, (_, bits) = run_ranks(fit_all, 2, tmp_path, configs)[0]
    assert bits.keys() == wanted_bits.keys()
    assert [name for name, value in wanted_bits.items() if not torch.equal(bits[name], value)] == []
    assert len(trained) == 2
    for losses, tensors in trained:
        assert losses == pytest.approx(wanted, abs=1e-5)
        assert tensors.keys() == weights.keys()
        assert max(float((tensors[key] - value).abs().max()) for key, value in weights.items()) < 1e-4


def logits(network: UVit | SuperRes, data: Data) -> Tensor:
    """Of eight tiny samples, as training gives them."""
    task = build_task(tiny.base_config(Path(data.model), data.states, ids="image_ids"))
    batch = task.batch(np.arange(8), np.ones(8, np.float32))
    assert isinstance(network, UVit)
    with torch.no_grad():
        condition = network.condition(batch["states"], batch["pooled"], batch["micro"])
        return network.head(network.features(batch["ids"], condition))


def test_diffusers_and_peft_open_the_adapter_and_compute_the_same(data: Data, tmp_path: Path) -> None:
    from diffusers import AmusedPipeline
    from diffusers.loaders import AmusedLoraLoaderMixin
    from peft import PeftModel
    from safetensors.torch import load_file

    task = trained_task(base(tmp_path, data, TEXT, optimizer={"lr": 1e-2, "warmup_steps": 3}))
    folder = f"{task.config.output}/model"
    styled = Pipeline.load(data.model, batch_size=2).styled({folder: 1.0})
    assert isinstance(task.network, UVit)
    ours = logits(task.network.eval(), data)
    assert not torch.allclose(ours, logits(load_base(Path(data.model) / "transformer"), data), atol=0.1)
    torch.testing.assert_close(logits(styled.base, data), ours, atol=1e-3, rtol=1e-4)

    plain = load_base(Path(data.model) / "transformer")
    theirs = PeftModel.from_pretrained(plain, f"{folder}/transformer").merge_and_unload()
    torch.testing.assert_close(logits(theirs, data), ours, atol=1e-3, rtol=1e-4)

    pipe = AmusedPipeline.from_pretrained(data.model)
    # Its deprecated pipeline has lost load_lora_weights; what that called is there.
    state = load_file(f"{folder}/{lora.DIFFUSERS}")
    AmusedLoraLoaderMixin.load_lora_into_transformer(state, None, pipe.transformer)
    AmusedLoraLoaderMixin.load_lora_into_text_encoder(state, None, pipe.text_encoder, prefix="text_encoder")
    fuse(pipe.transformer)
    fuse(pipe.text_encoder)
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value, styled.base.state_dict()[name], msg=name)
    fused = pipe.text_encoder.state_dict()
    encoder = TextEncoder.load(data.model).network.state_dict()
    moved = {name for name, value in styled.text.network.state_dict().items() if not torch.equal(value, encoder[name])}
    assert {name.rsplit(".", 2)[1] for name in moved} == set(TEXT)
    for name, value in styled.text.network.state_dict().items():
        torch.testing.assert_close(fused[name], value, msg=name)


def fuse(network: Any) -> None:
    """peft's layers in a network, merged and taken out again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()  # type: ignore[operator]
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, layer.get_base_layer())


def test_a_superres_adapter_goes_into_the_cascade(data: Data, tmp_path: Path) -> None:
    task = trained_task(superres(tmp_path, data))
    styled = Pipeline.load(data.cascade, batch_size=2).styled({f"{task.config.output}/model": 1.0})
    merged = load_superres(Path(data.cascade) / "superres")
    Adapter.load(f"{task.config.output}/model").merge(merged, "superres", 1.0)
    assert styled.superres is not None
    changed = merged.state_dict()
    assert all(torch.equal(value, changed[name]) for name, value in styled.superres.state_dict().items())
    before = load_superres(Path(data.cascade) / "superres").state_dict()
    assert {name.split(".")[-2] for name in before if not torch.equal(before[name], changed[name])} == {"to_q", "0"}


def test_samples_are_drawn_with_the_adapter(data: Data, tmp_path: Path) -> None:
    task = trained_task(base(tmp_path, data, TEXT, vqgan=data.encoders, optimizer={"lr": 3e-2, "warmup_steps": 0}))
    weights = {name: p.detach() for name, p in task.module.named_parameters() if p.requires_grad}
    nothing = {name: torch.zeros_like(value) for name, value in weights.items()}
    with_it, without = task.sample(weights), task.sample(nothing)
    assert with_it is not None
    assert without is not None
    assert np.asarray(with_it).shape == np.asarray(without).shape
    assert not np.array_equal(np.asarray(with_it), np.asarray(without))


WRONG: dict[str, tuple[Callable[[Path, Data], TrainConfig], str]] = {
    "target": (lambda root, data: base(root, data, lora={"targets": ("to_x",)}), "lora targets to_x: "),
    "one target": (lambda root, data: base(root, data, lora={"targets": ("to_q", "to_x")}), "no layer is named to_x"),
    "stored states": (
        lambda root, data: tiny.base_config(
            root, data.states, ids="image_ids", start_from=data.model, lora={"text_targets": TEXT}
        ),
        "can only be trained where the token shards hold text ids",
    ),
    "a smaller cascade": (
        lambda root, data: superres(root, data).model_copy(update={"input": data.large}),
        "low_grid is 4 and must be at least 8, high_grid is 8 and must be at least 16",
    ),
    "no model": (lambda root, data: base(root, data, start_from="/nowhere"), "/nowhere does not exist"),
    "no cascade": (
        lambda root, data: tiny.superres_config(root, data.states, start_from=data.model, model={}),
        "superres does not exist",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_said_at_once(case: str, data: Data, tmp_path: Path) -> None:
    make, complaint = WRONG[case]
    with pytest.raises(UserError, match=complaint):
        build_task(make(tmp_path, data))


def test_a_model_for_another_codebook_is_refused(data: Data, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", data.encoders, codebook_size=7, vocab_size=71)
    with pytest.raises(UserError, match=r"codebook_size is 7 and must be 32"):
        build_task(base(tmp_path, data, start_from=other))


def test_a_lora_needs_a_model_to_start_from(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="lora needs start_from"):
        base(tmp_path, data, start_from=None)
