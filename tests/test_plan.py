"""What a training would take: the work of a pass, memory by ZeRO stage, without shards, weights or a GPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from raymuse.cli.training_plan import GIB, train_plan
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.load import load
from raymuse.config.recipe import recipes
from raymuse.config.training import BaseConfig, LoraConfig, MaskedConfig
from raymuse.models.maskgit import MaskGitConfig
from raymuse.models.superres import SuperResConfig
from raymuse.models.uvit import UVitConfig
from raymuse.training.build import build_task
from raymuse.training.measure import Sizes, activations, flops, outline
from raymuse.training.plan import plan_of

AMUSED = UVitConfig(sample_size=16)
ONE = Sizes(1, (16, 16), 77)


def test_the_work_of_amuseds_passes_is_what_is_known_of_it() -> None:
    """Counted by others on the whole network: 213.5 and 656.8 GFLOP at 256 px, 227.4 and 698.5 at 512."""
    whole, forward = (flops(AMUSED, ONE, None, False, backward=back) for back in (True, False))
    assert (whole / 1e9, forward / 1e9) == pytest.approx((656.8, 213.5), abs=0.05)
    assert flops(AMUSED, ONE, LoraConfig(), False) < 0.7 * whole  # its weights need no gradients
    assert flops(AMUSED, ONE, None, True) == pytest.approx(whole + forward, rel=0.1)  # recomputed: a pass more
    large = UVitConfig(sample_size=32, downsample=True, upsample=True)
    assert flops(large, Sizes(1, (32, 32), 77), None, False) / 1e9 == pytest.approx(698.5, abs=0.05)


def test_the_work_of_muses_passes_follows_from_its_matrices() -> None:
    """A matrix costs 2 multiply-adds a token and parameter forward, twice that backward; attention its two products."""
    shape = MaskGitConfig()
    width, inner, cells, words = shape.hidden_size, shape.intermediate_size, 256, 256
    image = 6 * width**2 + 2 * width * inner  # q, k, v, out; q, out; MLP
    scores = 2 * width * (cells + words)
    layer = cells * (image + scores) + words * 2 * width**2
    rest = cells * (width**2 + width * shape.codebook_size) + words * shape.encoder_hidden_size * width
    forward = 2 * (shape.num_hidden_layers * layer + rest)
    first = 2 * words * shape.encoder_hidden_size * width  # the text needs no gradient
    assert flops(shape, Sizes(1, (16, 16), words), None, False) == pytest.approx(3 * forward - first, rel=1e-3)


def test_activations_grow_with_the_batch_and_shrink_by_recomputation() -> None:
    kept = [activations(AMUSED, Sizes(batch, (16, 16), 77), None, False, "bf16") for batch in (4, 8, 12)]
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=0.01)
    assert activations(AMUSED, Sizes(8, (16, 16), 77), None, True, "bf16") < 0.4 * kept[1]


def test_saved_tensors_are_the_activations() -> None:
    """What autograd keeps of a real pass in fp32 lies below the peak, and is most of it."""
    shape = MaskGitConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256,
                          encoder_hidden_size=32, vocab_size=96, codebook_size=32, sample_size=16)  # fmt: skip
    sizes = Sizes(4, (16, 16), 20)
    network = _on_cpu(outline(shape, None))
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(torch.zeros(4, 16, 16, dtype=torch.int64), torch.ones(4, 20, 32), None, None)
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), torch.zeros(1024, dtype=torch.int64))
    assert loss.requires_grad
    peak = activations(shape, sizes, None, False, "fp32")
    assert 0.7 * peak < sum(kept.values()) < peak


def _on_cpu(network: nn.Module) -> nn.Module:
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def masked(name: str, *changes: str) -> MaskedConfig:
    config = load(name, ["input=/nowhere/tokens", *changes])
    assert isinstance(config, MaskedConfig)
    return config


def test_memory_by_stage_is_what_each_divides() -> None:
    """ZeRO (Rajbhandari et al., arXiv 1910.02054, section 5), with fp32 weights, an average, and 64 workers."""
    plan = plan_of(masked("muse-3b"))
    count = 4 * plan.trained
    assert plan.trained == 3_267_860_480
    assert plan.sizes.text_tokens == 256
    whole, first, second, third = (plan.memory(stage) for stage in range(4))
    assert (whole.weights, whole.gradients, whole.state, whole.buffers) == (count, count, 3 * count, 0)
    assert (first.weights, first.gradients) == (count, count)
    assert (second.weights, second.gradients) == (count, count / 64)
    assert (third.weights, third.gradients, third.state) == (count / 64, count / 64, 3 * count / 64)
    assert first.state == second.state == 4 * count / 64  # and the shard that is updated
    assert whole.total(0) > 60 * GIB  # no GPU of 80 GB beside its activations
    assert third.total(plan.activations(recompute=True)) < 24 * GIB


@pytest.mark.parametrize(
    ("recipe", "rows", "published"),
    [
        ("finetune-256", 8, 19.7),
        ("finetune-512", 1, 16.99),
        ("lora-256", 16, 14.1),
        ("lora-512", 1, 5.6),
    ],
)
def test_fine_tuning_fits_where_amuseds_authors_measured_theirs(recipe: str, rows: int, published: float) -> None:
    """GB on their GPU, where their VQGAN and text encoder lie as well; ours read token shards."""
    plan = plan_of(masked(recipe, f"micro_batch_size={rows}"))
    stage = plan.config.zero.stage
    assert plan.memory(stage).total(plan.activations(recompute=True)) < published * 1e9


def test_recipes_are_planned_from_nothing() -> None:
    text = train_plan(masked("muse-632m"))
    assert text.startswith("train-base: 622,803,968 parameters, 500,000 steps of 512 on 8 workers\n")
    assert "grid 16 x 16, 77 text tokens: by the recipe, since there are no token shards at /nowhere/tokens" in text
    assert "at 40% of an H200's 790 TFLOP/s (bf16): " in text
    assert "\n* ZeRO 1 " in text
    hours = float(re.findall(r"([\d,.]+) GPU hours", text)[0].replace(",", ""))
    cost = float(re.findall(r"cost: USD ([\d,.]+) at 7.5 a GPU hour", text)[0].replace(",", ""))
    assert cost == pytest.approx(7.5 * hours, rel=1e-3)
    grown = plan_of(masked("base-512"))
    assert (grown.trained, grown.sizes.grid) == (608_257_792, (32, 32))
    assert plan_of(masked("base-256")).trained == 603_537_664
    muon = masked("base-256", "optimizer.name=muon")
    assert 4 * 603_537_664 < plan_of(muon).moments < 5 * 603_537_664


def test_with_token_shards_the_plan_is_theirs(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards")
    encoders = tiny.write_encoders(tmp_path / "encoders", shards)
    tokens = tiny.write_tokens(tmp_path / "tokens", shards, encoders, text="ids")
    model = tiny.write_model(tmp_path / "model", encoders)
    ours: dict[str, Any] = {"text_encoder": encoders}
    for config in (
        tiny.base_config(tmp_path, tokens, **ours),
        tiny.base_config(tmp_path, tokens, **ours, architecture="maskgit", model=tiny.MASKGIT),
        tiny.superres_config(tmp_path, tokens, **ours),
        tiny.base_config(tmp_path, tokens, **ours, ids="image_ids", start_from=model, lora={"rank": 2}),
    ):
        plan, task = plan_of(config), build_task(config)
        parameters = list(task.module.parameters())
        assert plan.trained == sum(p.numel() for p in parameters if p.requires_grad)
        told = sum(p.numel() for p in task.stream.text.network.parameters())  # type: ignore[attr-defined]
        assert plan.still - told == sum(p.numel() for p in parameters if not p.requires_grad)
        assert (plan.rows, plan.sizes.text_tokens) == (48, tiny.TEXT_LENGTH)
    machines: dict[str, Any] = {
        "network": {"interface": "ens5", "efa": True},
        "shard_cache": {"folder": str(tmp_path / "copies"), "gib": 5},
    }
    text = train_plan(tiny.base_config(tmp_path, tokens, **ours, **machines, workers=4, price_per_hour=1e9))
    assert "48 rows: an epoch is 6.0 steps" in text
    variables = "NCCL_SOCKET_IFNAME==ens5 GLOO_SOCKET_IFNAME=ens5 FI_PROVIDER=efa FI_EFA_USE_DEVICE_RDMA=1"
    assert f"every worker's environment: {variables}\n" in text
    assert f"copies of token shards: up to 5 GiB in {tmp_path / 'copies'} of each machine\n" in text
    assert not (tmp_path / "copies").exists()
    (rate,) = re.findall(r"at a core's 0.04 TFLOP/s: ([\d,.]+) samples/s on 4 cores", text)
    (cost,) = re.findall(r"cost: ([\d,.]+) at price_per_hour=1e\+09", text)
    seconds = 12 * 8 / float(rate.replace(",", ""))
    assert float(cost.replace(",", "")) == pytest.approx(1e9 * seconds / 3600, rel=0.01)
    other = {"architecture": "maskgit", "model": {**tiny.MASKGIT, "encoder_hidden_size": 9, "sample_size": 2}}
    for judge in (plan_of, build_task):
        with pytest.raises(
            ConfigError, match=r"(?s)encoder_hidden_size: is 9, and of the token shards 16.*sample_size: is 2"
        ):
            judge(tiny.base_config(tmp_path, tokens, **ours, **other))  # type: ignore[operator]


def test_what_cannot_be_planned_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no token shards at /nowhere/tokens; to plan without them, model\.sample_size"
    ):
        plan_of(masked("demo:base"))
    with pytest.raises(UserError, match="/nowhere/model does not exist"):
        plan_of(masked("finetune-256", "start_from=/nowhere/model"))
    (tmp_path / "_manifest").mkdir()
    with pytest.raises(UserError, match="is not finished"):
        plan_of(masked("muse-3b", f"input={tmp_path}"))
    with pytest.raises(ConfigError, match=r"model\.depth: no such field"):
        plan_of(masked("muse-3b", "model.depth=3"))
    assert isinstance(load("muse-3b"), BaseConfig)
    with torch.device("meta"):
        assert outline(SuperResConfig(), None).config.high_grid == 64


ASKED = {
    *("base-256", "base-512", "muse-632m", "muse-3b", "superres-512", "vqgan-f16", "vqgan-f8", "vqgan-decoder"),
    *("finetune-256", "finetune-512", "finetune-8bit-256", "finetune-8bit-512", "lora-256", "lora-512"),
    *("styledrop-256", "styledrop-512", "pokemon-blip-512", "critic"),
}
"""What docs/train.md names, and a person expects to find."""


def test_every_recipe_that_the_docs_name_is_there() -> None:
    assert {name for name, _ in recipes()} >= ASKED


@pytest.mark.parametrize("name", sorted(ASKED - {"critic", "vqgan-f16", "vqgan-f8", "vqgan-decoder"}))
def test_a_recipe_is_planned_without_data_weights_or_a_gpu(name: str) -> None:
    """Of a critic the base decides, and of a VQGAN the pictures are looked at first: see the test below."""
    plan = plan_of(masked(name))
    assert plan.trained > 0
    assert (plan.still > 0) == (plan.config.lora is not None)  # type: ignore[attr-defined]
    assert plan.rows is None
    text = train_plan(plan.config)
    assert f"{plan.trained:,} parameters" in text.splitlines()[0]
    assert "GiB a worker   weights" in text
    assert "GPU hours" in text


def test_vqgans_and_critics_are_planned_from_what_they_start_with(tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards", side=64)
    small = "model={block_out_channels: [8, 8, 16], layers_per_block: 1, norm_num_groups: 4}"
    encoders = tiny.write_encoders(tmp_path / "encoders", shards)
    for name, more in (("vqgan-f16", small), ("vqgan-f8", small), ("vqgan-decoder", f"start_from={encoders}")):
        text = train_plan(load(name, [f"input={shards}", f"output={tmp_path / name}", more]))  # type: ignore[arg-type]
        assert text.startswith("train-vqgan: ")
        assert "GPU hours\ncost: USD " in text
    assert "core hours\ncost: USD " in train_plan(tiny.clip_config(tmp_path, shards))
    tokens = tiny.write_tokens(tmp_path / "tokens", shards, encoders)
    model = tiny.write_model(tmp_path / "model", encoders)
    assert "to train and" in train_plan(masked("critic", f"input={tokens}", f"base={model}", "ids=image_ids"))
