"""UVit against diffusers' UVit2DModel, and what ours adds: gathered heads, constant conditions, checkpointing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UVit2DModel
from torch import Tensor
from torch.nn import functional as F

from raymuse.models.layers import Block
from raymuse.models.uvit import UVit, UVitConfig, sinusoids

TINY = UVitConfig(
    hidden_size=32,
    cond_embed_dim=12,
    micro_cond_encode_dim=8,
    micro_cond_embed_dim=40,
    encoder_hidden_size=20,
    vocab_size=40,
    codebook_size=32,
    in_channels=16,
    block_out_channels=24,
    num_res_blocks=1,
    block_num_heads=3,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    sample_size=8,
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs_for(config: UVitConfig, batch: int = 3, grid: tuple[int, int] = (8, 8), seed: int = 0) -> Inputs:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, *grid), generator=draw)
    text = torch.randn(batch, 7, config.encoder_hidden_size, generator=draw)
    pooled = torch.randn(batch, config.cond_embed_dim, generator=draw)
    micro = torch.tensor([[1024, 512, 0, 37, 6], [256, 256, 0, 0, 5], [999, 4000, 100, 3, 4]])[:batch]
    return ids, text, pooled, micro


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter away from its identity start, so that no branch can be wrong unseen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def seeded(config: UVitConfig, seed: int = 0) -> UVit:
    model = UVit(config)
    model.initialise(seed)
    return model


CONFIGS = {
    "plain": (TINY, (8, 8)),
    "resampled": (replace(TINY, downsample=True, upsample=True), (8, 8)),
    "resampled, not square": (replace(TINY, downsample=True, upsample=True, num_res_blocks=2), (4, 10)),
    "three res blocks": (replace(TINY, num_res_blocks=3), (8, 8)),
    "biases": (replace(TINY, use_bias=True, downsample=True, upsample=True), (8, 8)),
    "not square": (TINY, (3, 7)),
    "equal widths": (replace(TINY, block_out_channels=32, block_num_heads=2), (8, 8)),
    "plain norms": (replace(TINY, ln_elementwise_affine=False, layer_norm_eps=1e-3), (8, 8)),
}


@pytest.mark.parametrize(("config", "grid"), CONFIGS.values(), ids=list(CONFIGS))
def test_logits_and_parameters_are_those_of_diffusers(config: UVitConfig, grid: tuple[int, int]) -> None:
    reference = UVit2DModel.from_config(config.to_diffusers()).eval()
    disturb(reference)
    model = UVit(config).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(model.state_dict(), strict=True)
    arguments = inputs_for(config, grid=grid)
    with torch.no_grad():
        theirs = reference(*arguments).permute(0, 2, 3, 1)
        ours = model(*arguments)
    assert ours.shape == (3, *grid, config.codebook_size)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_diffusers() -> None:
    config = replace(TINY, downsample=True, upsample=True)
    reference = UVit2DModel.from_config(config.to_diffusers())
    disturb(reference)
    model = UVit(config)
    model.load_state_dict(reference.state_dict())
    arguments = inputs_for(config)
    reference(*arguments).square().mean().backward()
    model(*arguments).square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "count"),
    [(UVitConfig(), 603_537_664), (UVitConfig(downsample=True, upsample=True), 608_257_792)],
    ids=["amused-256", "amused-512"],
)
def test_released_models_have_the_published_size(config: UVitConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UVit(config).parameters()) == count


def test_config_maps_onto_diffusers_one_to_one() -> None:
    theirs = dict(UVit2DModel.from_config(TINY.to_diffusers()).config)
    assert UVitConfig.from_diffusers(theirs) == TINY
    assert TINY.to_diffusers()["_class_name"] == "UVit2DModel"
    assert TINY.mask_id == 39
    with pytest.raises(ValueError, match="unknown keys window"):
        UVitConfig.from_diffusers({**theirs, "window": 7})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"micro_cond_embed_dim": 41}, "micro_cond_embed_dim 41 must be 5 x"),
        ({"micro_cond_encode_dim": 7, "micro_cond_embed_dim": 35}, "must be even"),
        ({"codebook_size": 40}, "must be above codebook_size"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"block_num_heads": 7}, "not a multiple of block_num_heads"),
        ({"downsample": True}, "set together"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout 1.0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps 0.0"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(TINY, **change)


def test_config_names_every_problem_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads.*codebook_size"):
        replace(TINY, num_attention_heads=5, codebook_size=40)


def test_head_on_gathered_positions_is_the_forward_there() -> None:
    model = seeded(TINY)
    ids, *rest = inputs_for(TINY)
    masked = ids % 3 == 0
    features = model.features(ids, model.condition(*rest))
    assert features.shape == (3, 8, 8, TINY.block_out_channels)
    torch.testing.assert_close(model.head(features[masked]), model(ids, *rest)[masked])


@pytest.mark.parametrize("resample", [False, True])
def test_precomputed_condition_gives_the_same_logits_and_runs_no_context_layer(resample: bool) -> None:
    config = replace(TINY, downsample=resample, upsample=resample, num_res_blocks=2)
    model = seeded(config)
    disturb(model)
    ids, *rest = inputs_for(config)
    condition = model.condition(*rest)
    ready = model.precompute(condition)
    expected = model.features(ids, condition)
    for name, module in model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "norm1.linear", "kv_mapper", "cond_embeds_mapper")):
            module.register_forward_pre_hook(lambda module, _: pytest.fail(f"ran {module}"))
    torch.testing.assert_close(model.features(ids, ready), expected, atol=1e-6, rtol=1e-6)


def test_odd_grid_is_refused_only_by_a_model_that_down_samples() -> None:
    config = replace(TINY, downsample=True, upsample=True)
    with pytest.raises(ValueError, match="grid 5x6"):
        UVit(config)(*inputs_for(config, grid=(5, 6)))
    assert UVit(TINY)(*inputs_for(TINY, grid=(5, 6))).shape == (3, 5, 6, 32)


def loss_of(model: UVit, arguments: Inputs) -> Tensor:
    ids = arguments[0]
    return F.cross_entropy(model(*arguments).flatten(0, 2), ids.flatten() % model.config.codebook_size)


def test_checkpointing_recomputes_every_block_and_keeps_the_gradients() -> None:
    config = replace(TINY, downsample=True, upsample=True, num_res_blocks=2)
    model = seeded(config)
    disturb(model)
    arguments = inputs_for(config)
    loss_of(model, arguments).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    runs: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, __, name=name: runs.append(name))  # type: ignore[misc]
    model.gradient_checkpointing = True
    loss_of(model, arguments).backward()
    assert len(runs) == 2 * len(set(runs)) == 2 * (config.num_hidden_layers + 4 * config.num_res_blocks)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-6)


def test_checkpointing_repeats_dropout() -> None:
    model = seeded(replace(TINY, hidden_dropout=0.3, attention_dropout=0.3))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss_of(model, inputs_for(TINY)).backward()
        assert model.embed.conv.weight.grad is not None
        gradients.append(model.embed.conv.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-6)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = seeded(TINY, seed=5).state_dict()
    torch.manual_seed(2)
    again = seeded(TINY, seed=5).state_dict()
    other = seeded(TINY, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.conv.weight"], other["embed.conv.weight"])


def test_initial_loss_is_that_of_a_guess() -> None:
    config = replace(TINY, vocab_size=1100, codebook_size=1024)
    loss = loss_of(seeded(config), inputs_for(config))
    assert loss.item() == pytest.approx(math.log(1024), abs=0.3)


def test_every_parameter_learns() -> None:
    config = replace(TINY, use_bias=True, downsample=True, upsample=True)
    model = seeded(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = inputs_for(config)
    first = loss_of(model, arguments)
    first.backward()
    for _ in range(2):  # modulations start at zero: what lies before them learns from the second step on
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model, arguments)
        loss.backward()
    # A bias on keys adds the same to all of a query's scores, and softmax does not see it.
    silent = [
        name
        for name, parameter in model.named_parameters()
        if not name.endswith("to_k.bias") and not (parameter.grad is not None and parameter.grad.abs().max() > 0)
    ]
    assert silent == []
    assert loss < first


def test_training_learns_text_and_position() -> None:
    """With every id hidden, text tells the samples apart, and the convolutions' padding the edges."""
    model = seeded(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, *rest = inputs_for(TINY)
    edges = torch.tensor([1, 0, 0, 0, 0, 0, 0, 2])
    targets = (7 * torch.arange(3)[:, None, None] + edges).expand_as(ids)
    for _ in range(60):
        logits = model(torch.full_like(ids, TINY.mask_id), *rest)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6  # blind to text it would stay above 1.10 = log 3, blind to edges above 1.06


def test_sinusoids_stay_exact_when_the_model_is_half_precision() -> None:
    values = torch.tensor([[1023.0, 0.0]])
    exact = torch.cos(values.double()[0, 0] * 10000.0 ** (-torch.arange(4).double() / 4))
    made = sinusoids(values, 8)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made[0, 0, :4].double(), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(made[0, 1], torch.tensor([1.0] * 4 + [0.0] * 4))


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
