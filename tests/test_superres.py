"""The super-resolution transformer: it sees the low-res ids, where they are, and learns from them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raymuse.models.layers import Block
from raymuse.models.superres import LowResSkip, SuperRes, SuperResConfig

TINY = SuperResConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    low_res_layers=1,
    encoder_hidden_size=20,
    vocab_size=20,
    codebook_size=16,
    low_vocab_size=12,
    low_grid=4,
    high_grid=8,
)
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs_for(config: SuperResConfig, batch: int = 3, low_grid: tuple[int, int] = (4, 4), seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    high_grid = (low_grid[0] * config.scale, low_grid[1] * config.scale)
    ids = torch.randint(config.vocab_size, (batch, *high_grid), generator=draw)
    text = torch.randn(batch, 7, config.encoder_hidden_size, generator=draw)
    low = torch.randint(config.low_vocab_size, (batch, *low_grid), generator=draw)
    return ids, text, low


def seeded(config: SuperResConfig, seed: int = 0) -> SuperRes:
    model = SuperRes(config)
    model.initialise(seed)
    return model


@pytest.mark.parametrize("low_grid", [(4, 4), (2, 4), (3, 1)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_fit_the_grid(low_grid: tuple[int, int], qk_norm: bool) -> None:
    config = replace(TINY, qk_norm=qk_norm)
    logits = seeded(config)(*inputs_for(config, low_grid=low_grid))
    assert logits.shape == (3, 2 * low_grid[0], 2 * low_grid[1], config.codebook_size)
    assert torch.isfinite(logits).all()


def test_the_skip_gives_every_high_res_cell_what_lies_under_and_beside_it() -> None:
    skip = LowResSkip(width=5, scale=2)
    with torch.no_grad():
        skip.conv.weight.zero_()
        skip.conv.weight[..., 1, 1] = torch.cat([factor * torch.eye(5) for factor in (1, 2, 3, 4)])
        skip.conv.weight[..., 1, 2] = torch.cat([0 * torch.eye(5), torch.eye(5)] * 2)  # right columns: the next cell
    low = torch.randn(2, 3, 4, 5)
    high = skip(low)
    assert high.shape == (2, 6, 8, 5)
    beside = torch.cat([low[:, :, 1:], torch.zeros(2, 3, 1, 5)], dim=2)
    for number, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)], start=1):
        torch.testing.assert_close(high[:, row::2, column::2], number * low + column * beside)
    config = replace(TINY, low_res_skip=True)
    logits = seeded(config)(*inputs_for(config, low_grid=(3, 2)))
    assert logits.shape == (3, 6, 4, config.codebook_size)


def test_muse_sizes_build() -> None:
    with torch.device("meta"):
        model = SuperRes(SuperResConfig(encoder_hidden_size=4096))
    assert len(model.low_layers) == 16
    assert len(model.layers) == 32


def test_config_round_trip_and_mask_id() -> None:
    assert SuperResConfig.from_dict(TINY.to_dict()) == TINY
    assert TINY.mask_id == 19
    with pytest.raises(ValueError, match="unknown keys windows"):
        SuperResConfig.from_dict({**TINY.to_dict(), "windows": 7})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"codebook_size": 20}, "must be above codebook_size"),
        ({"high_grid": 9}, "high_grid 9 is not a multiple of low_grid 4"),
        ({"low_res_layers": 0}, "low_res_layers is 0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps 0.0"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **change)


def test_grids_that_do_not_fit_are_refused() -> None:
    model = SuperRes(TINY)
    ids, text, low = inputs_for(TINY)
    with pytest.raises(ValueError, match="must be 2 times the low-res grid"):
        model(ids[:, :6], text, low)
    with pytest.raises(ValueError, match="larger than 4"):
        model(ids, text, ids)


def test_each_condition_part_depends_on_its_own_input_alone() -> None:
    """So text dropout, which the caller does, leaves the low-res ids in place."""
    model = seeded(TINY)
    _, text, low = inputs_for(TINY)
    both = model.condition(text, low)
    dropped = model.condition(torch.zeros_like(text), low)
    assert both.text.shape == (3, 7, 48)
    assert both.low.shape == (3, 4, 4, 48)
    assert torch.equal(both.low, dropped.low)
    assert not torch.equal(both.text, dropped.text)
    assert torch.equal(both.text, model.condition(text, low.flip(1)).text)


def test_low_res_position_is_the_mean_over_the_cells_it_covers() -> None:
    model = seeded(TINY)
    ids, _, low = inputs_for(TINY)
    fine = model.positions(ids, coarse=False)
    coarse = model.positions(low, coarse=True)
    torch.testing.assert_close(coarse[1, 3], fine[2:4, 6:8].mean((0, 1)), atol=1e-6, rtol=1e-6)


def test_low_res_ids_and_text_both_reach_the_logits() -> None:
    model = seeded(TINY)
    ids, text, low = inputs_for(TINY)
    logits = model(ids, text, low)
    assert (model(ids, text, low.flip(2)) - logits).abs().max() > 1e-3
    assert (model(ids, text.flip(0), low) - logits).abs().max() > 1e-3


def toy_batch(draw: torch.Generator) -> tuple[Inputs, Tensor, Tensor]:
    """High ids that are a function of the low id above them; inputs with four in five hidden, targets, the mask."""
    low = torch.randint(TINY.low_vocab_size, (32, 4, 4), generator=draw)
    targets = (low.repeat_interleave(2, 1).repeat_interleave(2, 2) * 5 + 3) % TINY.codebook_size
    hidden = torch.rand(targets.shape, generator=draw) < 0.8
    ids = torch.where(hidden, TINY.mask_id, targets)
    return (ids, torch.zeros(32, 2, TINY.encoder_hidden_size), low), targets, hidden


def test_training_learns_to_read_the_low_res_ids() -> None:
    model = seeded(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(90):
        arguments, targets, hidden = toy_batch(draw)
        features = model.features(arguments[0], model.condition(*arguments[1:]))
        loss = F.cross_entropy(model.head(features[hidden]), targets[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (ids, text, low), targets, hidden = toy_batch(draw)
    with torch.no_grad():
        right = F.cross_entropy(model(ids, text, low)[hidden], targets[hidden])
        permuted = low.flatten(1)[:, torch.randperm(16, generator=draw)].view_as(low)
        wrong = F.cross_entropy(model(ids, text, permuted)[hidden], targets[hidden])
    assert right < 1.0
    assert wrong > right + 1.0


def test_head_on_gathered_positions_is_the_forward_there() -> None:
    model = seeded(TINY)
    ids, text, low = inputs_for(TINY)
    masked = ids % 3 == 0
    features = model.features(ids, model.condition(text, low))
    torch.testing.assert_close(model.head(features[masked]), model(ids, text, low)[masked])


def test_precomputed_condition_gives_the_same_features() -> None:
    model = seeded(TINY)
    ids, text, low = inputs_for(TINY)
    condition = model.condition(text, low)
    ready = model.precompute(condition)
    expected = model.features(ids, condition)
    torch.testing.assert_close(model.features(ids, ready), expected, atol=1e-6, rtol=1e-5)


def loss_of(model: SuperRes, arguments: Inputs) -> Tensor:
    return F.cross_entropy(model(*arguments).flatten(0, 2), arguments[0].flatten() % model.config.codebook_size)


def test_checkpointing_recomputes_every_block_and_keeps_the_gradients() -> None:
    model = seeded(TINY)
    arguments = inputs_for(TINY)
    loss_of(model, arguments).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    runs: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, __, name=name: runs.append(name))  # type: ignore[misc]
    model.gradient_checkpointing = True
    loss_of(model, arguments).backward()
    assert len(runs) == 2 * len(set(runs)) == 2 * (TINY.num_hidden_layers + TINY.low_res_layers)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-6)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (seeded(TINY, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_initial_loss_is_that_of_a_guess_and_every_parameter_learns() -> None:
    config = replace(TINY, vocab_size=1100, codebook_size=1024, qk_norm=True)
    model = seeded(config)
    loss = loss_of(model, inputs_for(config))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1024), abs=0.3)
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


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
