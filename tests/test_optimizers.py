"""Muon: the step against PyTorch's own, which parameters it takes, whole trainings with it; and training in bf16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from ranks import run_ranks
from raymuse.config.errors import UserError
from raymuse.config.training import ClipConfig, OptimizerConfig, TrainConfig, VqganConfig
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.training.clip import build_clip
from raymuse.training.muon import Muon, is_muon, orthogonalised
from raymuse.training.optimizers import build_optimizer
from raymuse.training.vqgan import build_vqgan
from trainings import fit, fit_all

SHAPES = [(16, 16), (8, 40), (40, 8)]


def train(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[nn.Parameter]:
    """Matrices after six steps on fixed gradients."""
    draw = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    optimizer = make(matrices)
    for _ in range(6):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=draw)
        optimizer.step()
    return matrices


def ours(matrices: list[nn.Parameter]) -> Muon:
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    return Muon(matrices, adamw, lr=0.02, momentum=0.95, weight_decay=0.1)


def theirs(matrices: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)


def test_steps_are_those_of_pytorchs_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # theirs rounds to it on the CPU too
    for matrix, wanted in zip(train(ours), train(theirs), strict=True):
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (32, 16, 3, 3), (128, 8, 2, 2)])
def test_updates_are_nearly_orthogonal_and_keep_their_bases(shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rows, columns = update.flatten(1).shape
    made = orthogonalised(update).flatten(1) / max(1, rows / columns) ** 0.5
    strengths = torch.linalg.svdvals(made)
    assert 0.6 < float(strengths.min()) < float(strengths.max()) < 1.3
    left, _, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
    between = left.T @ made @ right.T
    torch.testing.assert_close(between, between.diagonal().diag(), rtol=0, atol=1e-4)


def taken(network: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the weights of two or more dimensions that Muon trains, and of those that AdamW does."""
    groups: list[dict[str, Any]] = build_optimizer(network, OptimizerConfig(name="muon")).param_groups
    muon = {id(p) for group in groups if is_muon(group) for p in group["params"]}
    named = {name: p for name, p in network.named_parameters() if p.ndim >= 2}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    return {n for n, p in named.items() if id(p) in muon}, {n for n, p in named.items() if id(p) not in muon}


def test_the_first_and_the_last_layer_of_a_vqgan_are_adamws() -> None:
    muon, adamw = taken(build_vqgan(VqganConfig(input="x", output="x", steps=1, model=tiny.VQGAN)))
    assert adamw == {"encoder.conv_in.weight", "decoder.conv_out.weight", "quantize.embedding.weight"}
    assert {"encoder.mid_block.resnets.0.conv1.weight", "quant_conv.weight", "decoder.conv_in.weight"} <= muon


def test_the_first_and_the_last_layers_of_a_clip_are_adamws() -> None:
    muon, adamw = taken(build_clip(ClipConfig(input="x", output="x", steps=1, model=tiny.CLIP), 640, 639))
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in adamw} == {
        *("patch_embedding", "position_embedding", "token_embedding", "visual_projection", "text_projection")
    }
    assert len(muon) == 2 * tiny.CLIP["layers"] * 6


def test_embeddings_head_depthwise_kernels_and_response_norms_of_a_uvit_are_adamws() -> None:
    muon, adamw = taken(UVit(UVitConfig(**tiny.UVIT, downsample=True, upsample=True)))
    sides = [f"{side}_block.res_blocks.0" for side in ("down", "up")]
    kinds = ("depthwise.weight", "channelwise_norm.gamma", "channelwise_norm.beta")
    inside = {f"{side}.{kind}" for side in sides for kind in kinds}
    assert adamw == {"embed.embeddings.weight", "mlm_layer.conv2.weight", *inside}
    assert {"embed.conv.weight", "down_block.downsample.conv.weight", "up_block.upsample.conv.weight"} <= muon


def test_embeddings_and_head_of_a_superres_are_adamws() -> None:
    _, adamw = taken(SuperRes(SuperResConfig(**tiny.SUPERRES)))
    embeddings = {f"{name}.weight" for name in ("embed", "low_embed", "positions.rows", "positions.columns")}
    assert adamw == {*embeddings, "mlm_head.logits.weight"}


# --- whole trainings, with Muon and in bf16


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainConfig]:
    """make(training, ...): a config on tiny data, whose output is a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    kinds = {
        "base": (tiny.base_config, tokens),
        "superres": (tiny.superres_config, tokens),
        "vqgan": (tiny.vqgan_config, shards),
        "clip": (tiny.clip_config, shards),
    }

    def config(training: str, **changes: Any) -> TrainConfig:
        kind, source = kinds[training]
        return kind(tmp_path_factory.mktemp(training), source, **{"steps": 24, "log_every": 1, **changes})

    return config


def test_a_checkpoint_goes_on_with_its_own_optimizer_alone(make: Callable[..., TrainConfig]) -> None:
    first = make("vqgan", steps=2)
    fit(first)
    other = first.model_copy(update={"steps": 3, "optimizer": OptimizerConfig(name="muon")})
    with pytest.raises(UserError, match=r"step-00000002: .*no momentum_buffer of network.*optimizer.name: muon needs"):
        fit(other)
    assert len(fit(first.model_copy(update={"steps": 3}))[0]) == 1


def assert_bf16_follows(losses: list[float], wanted: list[float], tensors: dict[str, Tensor]) -> None:
    assert losses != wanted
    assert losses == pytest.approx(wanted, rel=0.03)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("training", ["base", "superres", "vqgan", "clip"])
def test_bf16_trains_as_fp32_does_and_keeps_fp32_weights(training: str, make: Callable[..., TrainConfig]) -> None:
    losses, tensors = fit(make(training, precision="bf16"))
    assert_bf16_follows(losses, fit(make(training))[0], tensors)


def test_bf16_and_muon_train_at_zero_2_and_3_and_go_on_with_the_same_bits(
    make: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    changes = {
        "model": {**tiny.UVIT, "intermediate_size": 4096},  # ZeRO-3 keeps matrices of fewer than 100,000 numbers whole
        "optimizer": {"name": "muon", "lr": 2e-3, "muon_lr": 0.005, "warmup_steps": 3},
        "ema_decay": 0.9,
    }
    sharded = {"precision": "bf16", "workers": 2, "gradient_checkpointing": True, "checkpoint": {"every": 12}}
    configs = [make("base", **changes, **sharded, zero={"stage": stage}) for stage in (2, 3)]
    wanted, _ = fit(make("base", **changes))
    straight = run_ranks(fit_all, 2, tmp_path / "straight", configs)[0]
    for config in configs:
        (Path(config.output) / "step-00000024" / "checkpoint.json").unlink()
    resumed = run_ranks(fit_all, 2, tmp_path / "resumed", configs)[0]
    for (losses, tensors), (rest, again) in zip(straight, resumed, strict=True):
        assert_bf16_follows(losses, wanted, tensors)
        assert rest == losses[12:]
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
