"""Muse's base against plain formulas: attention, padding, positions, sizes; constant conditions and checkpointing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymuse.models.layers import Block
from raymuse.models.maskgit import MaskGit, MaskGitConfig, MaskGitLayer

TINY = MaskGitConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    encoder_hidden_size=20,
    vocab_size=40,
    codebook_size=32,
    sample_size=8,
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
WORDS = (7, 3, 1)


def inputs_for(config: MaskGitConfig, grid: tuple[int, int] = (8, 8), seed: int = 0) -> Inputs:
    """Three samples of 7, 3 and 1 text tokens, the rest being padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (len(WORDS), *grid), generator=draw)
    text = torch.randn(len(WORDS), max(WORDS), config.encoder_hidden_size, generator=draw)
    for row, words in enumerate(WORDS):
        text[row, words:] = 0
    return ids, text, torch.randn(len(WORDS), 5, generator=draw), torch.zeros(len(WORDS), 5)


def seeded(config: MaskGitConfig, seed: int = 0) -> MaskGit:
    model = MaskGit(config)
    model.initialise(seed)
    return model


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_attention(weights: dict[str, Tensor], name: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """Softmax of scaled scores, head by head, over a context without padding: (L, D), (T, D) to (L, D)."""
    query, key, value = (
        given @ weights[f"{name}.to_{part}.weight"].T for given, part in ((x, "q"), (context, "k"), (context, "v"))
    )
    width = query.shape[-1] // heads
    mixed = []
    for head in range(heads):
        place = slice(head * width, (head + 1) * width)
        scores = query[:, place] @ key[:, place].T / math.sqrt(width)
        mixed.append(scores.exp() / scores.exp().sum(dim=-1, keepdim=True) @ value[:, place])
    return torch.cat(mixed, dim=-1) @ weights[f"{name}.to_out.0.weight"].T


def plain_logits(model: MaskGit, ids: Tensor, text: Tensor) -> Tensor:
    """One sample (h, w), its text tokens (T, E) without padding, to logits (h w, K): the paper's layers written out."""
    weights, heads = dict(model.named_parameters()), model.config.num_attention_heads
    told = plain_norm(text @ weights["text_proj.weight"].T, weights["text_norm.weight"])
    x = torch.stack(
        [
            weights["embed.weight"][ids[row, column]]
            + weights["positions.rows.weight"][row]
            + weights["positions.columns.weight"][column]
            for row in range(ids.shape[0])
            for column in range(ids.shape[1])
        ]
    )
    for number in range(model.config.num_hidden_layers):
        layer = f"layers.{number}"
        normed = plain_norm(x, weights[f"{layer}.norm1.weight"])
        x = x + plain_attention(weights, f"{layer}.attn1", normed, normed, heads)
        x = x + plain_attention(weights, f"{layer}.attn2", plain_norm(x, weights[f"{layer}.norm2.weight"]), told, heads)
        inner = F.gelu(plain_norm(x, weights[f"{layer}.norm3.weight"]) @ weights[f"{layer}.mlp.0.weight"].T)
        x = x + inner @ weights[f"{layer}.mlp.2.weight"].T
    x = F.gelu(plain_norm(x, weights["norm.weight"]) @ weights["mlm_head.dense.weight"].T)
    return plain_norm(x, weights["mlm_head.norm.weight"]) @ weights["mlm_head.logits.weight"].T


@pytest.mark.parametrize("grid", [(8, 8), (3, 5)])
def test_logits_are_those_of_the_layers_written_out_without_padding(grid: tuple[int, int]) -> None:
    model = seeded(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5  # scores that tell tokens apart
        ids, text, pooled, micro = inputs_for(TINY, grid)
        made = model(ids, text, pooled, micro)
        for row, words in enumerate(WORDS):
            wanted = plain_logits(model, ids[row], text[row, :words])
            torch.testing.assert_close(made[row].flatten(0, 1), wanted, atol=1e-4, rtol=1e-4)
    assert made.shape == (3, *grid, TINY.codebook_size)
    assert made.std() > 0.1


def test_padding_says_nothing_and_gets_no_gradient() -> None:
    model = seeded(TINY)
    ids, text, pooled, micro = inputs_for(TINY)
    text.requires_grad_(True)
    model(ids, text, pooled, micro).square().sum().backward()
    assert text.grad is not None
    real = torch.arange(max(WORDS))[None, :] < torch.tensor(WORDS)[:, None]
    assert torch.equal(text.grad.abs().sum(dim=-1) > 0, real)
    longer = torch.cat([text.detach(), torch.zeros(3, 9, 20)], dim=1)
    torch.testing.assert_close(model(ids, longer, pooled, micro), model(ids, text.detach(), pooled, micro))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_of_padding_alone_is_finite(dtype: torch.dtype) -> None:
    """Rows that only fill up a batch have no text at all."""
    model = seeded(TINY).to(dtype)
    ids, text, pooled, micro = inputs_for(TINY)
    ready = model.precompute(model.condition(torch.zeros_like(text), pooled, micro))
    assert model.head(model.features(ids, ready)).isfinite().all()


def test_published_sizes() -> None:
    """3B is the paper's shape. Of the 632M the paper tells the size alone: ours is the nearest of width 1024."""
    small = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 36}
    for shape, count, published in (({}, 3_267_860_480, 3e9), (small, 626_211_840, 632e6)):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in MaskGit(MaskGitConfig(**shape)).parameters())  # type: ignore[arg-type]
        assert parameters == count
        assert parameters == pytest.approx(published, rel=0.1)


def test_every_position_is_its_own_and_a_larger_grid_is_refused() -> None:
    model = seeded(TINY)
    ids, *told = inputs_for(TINY)
    logits = model(torch.zeros_like(ids), *told)[0].flatten(0, 1)
    assert torch.cdist(logits, logits).fill_diagonal_(1).min() > 1e-3
    with pytest.raises(ValueError, match=r"grid \(9, 8\) is larger than 8"):
        model(*inputs_for(TINY, (9, 8)))


def test_config_round_trip_and_mask_id() -> None:
    assert MaskGitConfig.from_dict(TINY.to_dict()) == TINY
    assert TINY.mask_id == 39
    with pytest.raises(ValueError, match="unknown keys windows"):
        MaskGitConfig.from_dict({**TINY.to_dict(), "windows": 7})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"codebook_size": 40}, "must be above codebook_size"),
        ({"num_attention_heads": 5, "dropout": 1.0}, "not a multiple of num_attention_heads.*dropout 1.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps 0.0"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **change)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_precomputed_condition_gives_the_same_logits_and_reads_no_text(qk_norm: bool) -> None:
    model = seeded(replace(TINY, qk_norm=qk_norm))
    ids, *told = inputs_for(TINY)
    condition = model.condition(*told)
    ready = model.precompute(condition)
    expected = model.features(ids, condition)
    for name, module in model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "text_proj")):
            module.register_forward_pre_hook(lambda module, _: pytest.fail(f"ran {module}"))
    torch.testing.assert_close(model.features(ids, ready), expected, atol=1e-6, rtol=1e-6)


def loss_of(model: MaskGit, arguments: Inputs) -> Tensor:
    ids = arguments[0]
    return F.cross_entropy(model(*arguments).flatten(0, 2), ids.flatten() % model.config.codebook_size)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_every_layer_and_keeps_the_gradients(dropout: float) -> None:
    model = seeded(replace(TINY, dropout=dropout))
    runs: list[Block] = []
    for layer in model.layers:
        assert isinstance(layer, MaskGitLayer)
        layer.register_forward_pre_hook(lambda layer, _: runs.append(layer))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss_of(model, inputs_for(TINY)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(runs) == 3 * TINY.num_hidden_layers
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-6)
        assert gradient is not None
        assert gradient.abs().max() > 0, name


def test_initial_weights_depend_on_the_seed_alone_and_guess() -> None:
    config = replace(TINY, vocab_size=1100, codebook_size=1024)
    torch.manual_seed(1)
    first = seeded(config, seed=5).state_dict()
    torch.manual_seed(2)
    again = seeded(config, seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], seeded(config, seed=6).state_dict()["embed.weight"])
    assert loss_of(seeded(config), inputs_for(config)).item() == pytest.approx(math.log(1024), abs=0.3)


def test_training_learns_text_and_position() -> None:
    """With every id hidden, text tells the samples apart, and the learned positions the columns."""
    model = seeded(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, *told = inputs_for(TINY)
    targets = (8 * torch.arange(3)[:, None, None] + torch.arange(8)).expand_as(ids)
    for _ in range(60):
        logits = model(torch.full_like(ids, TINY.mask_id), *told)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3  # blind to text it would stay above 1.10 = log 3, blind to columns above 2.08 = log 8


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_stays_near_fp32(how: str) -> None:
    model = seeded(TINY).eval()
    arguments = inputs_for(TINY)
    with torch.no_grad():
        exact = model(*arguments)
        if how == "weights":
            rough = model.bfloat16()(*arguments)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(*arguments)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0)
