"""Gradients summed as integers: in any order the same bits, as exact as the sum itself, and none that is no number."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import tiny
from raymuse.config.training import MaskedConfig
from raymuse.training import alone
from raymuse.training.exact import LARGEST, UNIT, ExactSums
from raymuse.training.plan import plan_of

PIECES = 7


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(40, 30), (17,), (3, 5, 2)]]


def losses(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Losses whose gradients are of very different sizes."""
    draw = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 3, PIECES)
    return [
        sum(((p * torch.randn(p.shape, generator=draw)).sin() * size).sum() for p in parameters)  # type: ignore[misc]
        for size in sizes
    ]


def summed(parameters: list[nn.Parameter], order: list[int], scale: float = 1.0) -> list[Tensor]:
    sums = ExactSums(parameters, PIECES)
    pieces = losses(parameters)
    for piece in order:
        sums.backward(pieces[piece], scale)
    return sums.take(None)[0]


def test_the_order_of_the_pieces_changes_no_bit(parameters: list[nn.Parameter]) -> None:
    wanted = summed(parameters, list(range(PIECES)))
    for seed in range(5):
        found = summed(parameters, np.random.default_rng(seed).permutation(PIECES).tolist())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_as_they_come_the_order_does(parameters: list[nn.Parameter]) -> None:
    """What they are for: added as floating-point numbers the same pieces differ."""

    def added(order: range) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        pieces = losses(parameters)
        for piece in order:
            pieces[piece].backward()  # type: ignore[no-untyped-call]
        assert parameters[0].grad is not None
        return parameters[0].grad

    assert not torch.equal(added(range(PIECES)), added(range(PIECES - 1, -1, -1)))


def test_a_sum_is_the_nearest_number_to_the_true_one(parameters: list[nn.Parameter]) -> None:
    pieces = [torch.autograd.grad(loss, parameters) for loss in losses(parameters)]
    true = [sum(gradient.double() for gradient in column) for column in zip(*pieces, strict=True)]
    for ours, wanted in zip(summed(parameters, list(range(PIECES))), true, strict=True):
        assert isinstance(wanted, Tensor)
        assert float((ours.double() - wanted).abs().max()) <= float(wanted.abs().max()) * 2.0**-24 + PIECES * UNIT


def test_a_factor_on_the_loss_is_taken_out_again(parameters: list[nn.Parameter]) -> None:
    plain, scaled = (summed(parameters, list(range(PIECES)), scale) for scale in (1.0, 2.0**12))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(scaled, plain, strict=True))


def test_gradients_are_clipped_as_pytorch_does(parameters: list[nn.Parameter]) -> None:
    sums = ExactSums(parameters, 1)
    sums.backward(losses(parameters)[3])
    found, norm = sums.take(0.5)
    gradients = torch.autograd.grad(losses(parameters)[3], parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    wanted = nn.utils.clip_grad_norm_(parameters, 0.5)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    for ours, parameter in zip(found, parameters, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(ours, parameter.grad, rtol=1e-4, atol=1e-9)


def test_a_parameter_that_had_no_part_has_a_gradient_of_nought(parameters: list[nn.Parameter]) -> None:
    sums = ExactSums(parameters, 1)
    sums.backward(parameters[0].square().sum())
    found, norm = sums.take(None)
    assert float(norm) > 0
    assert [int(gradient.count_nonzero()) for gradient in found[1:]] == [0, 0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.01 * LARGEST / PIECES])
def test_a_gradient_that_is_no_number_or_too_large_ends_its_step_alone(
    wrong: float, parameters: list[nn.Parameter]
) -> None:
    sums = ExactSums(parameters, PIECES)
    sums.backward(parameters[1].sum() * wrong)
    sums.backward(parameters[1].sum())
    assert not sums.take(1.0)[1].isfinite()
    sums.backward(parameters[1].sum())
    assert float(sums.take(1.0)[1]) == pytest.approx(17**0.5)


def test_the_largest_that_all_pieces_may_have_together_fits(parameters: list[nn.Parameter]) -> None:
    sums = ExactSums(parameters, PIECES)
    for _ in range(PIECES):
        sums.backward(parameters[1].sum() * (0.99 * LARGEST / PIECES))
    found, norm = sums.take(None)
    assert norm.isfinite()
    assert found[1] == pytest.approx(torch.full((17,), 0.99 * LARGEST), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2, "zero": {"stage": 3}}, "needs zero.stage 0, 1 or 2"),
        ({"workers": 2, "zero": {"stage": 2, "offload": True}}, "no zero.offload"),
        ({"micro_batch_size": 2}, "is the micro batch already"),
        ({"exact_rows": 9}, "more than the rows of a step"),
        ({"stream": {"input": "a", "vqgan": "b", "text_encoder": "c"}}, "reads token shards"),
    ],
)
def test_what_cannot_be_summed_exactly_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny.base_config(tmp_path, "tokens", **{"exact_rows": 2, **changes})


PLANNED = {**tiny.UVIT, "sample_size": 8, "encoder_hidden_size": 32}
ELASTIC = {"workers": {"min": 1, "max": 3}}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 4),  # in twos or ones a single worker would take twice as long
        ({"batch_size": 64}, 11),  # 66, 33 and 22 rows; of 16 three would have 32
        ({"batch_size": 64, "workers": {"min": 1, "max": 4}}, 8),
        ({"batch_size": 64, "workers": {"min": 1, "max": 16}}, 2),
        ({"batch_size": 64, "workers": {"min": 2, "max": 2}}, None),
        ({"batch_size": 64, "micro_batch_size": 5}, 5),  # no more than a worker holds
        ({"batch_size": 64, "exact_rows": 16}, 16),
        ({"exact_rows": None}, None),
        ({"workers": 2}, None),
        ({"use_gpu": True}, None),
        ({"zero": {"stage": 3}}, None),
        ({"zero": {"stage": 2, "offload": True}}, None),
        ({"stream": {"input": "a", "vqgan": "b", "text_encoder": "c"}}, None),
    ],
)
def test_where_workers_are_a_range_sums_are_exact_by_themselves(
    changes: dict[str, Any], rows: int | None, tmp_path: Path
) -> None:
    assert tiny.base_config(tmp_path, "tokens", **{**ELASTIC, **changes}).exact == rows


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        (["workers={min: 2, max: 4}"], 8),
        (["workers={min: 2, max: 4}", "micro_batch_size=4"], 4),
        (["workers={min: 2, max: 4}", "exact_rows=null"], None),
        (["workers={min: 2, max: 4}", "exact_rows=16"], 16),
        (["workers=2"], None),
        (["workers=0", "zero.offload=true"], None),  # as torchrun's three workers it may be
    ],
)
def test_torchrun_sums_a_recipe_for_a_range_as_ray_does(
    changes: list[str], rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = alone.config_of("base-256", ["use_gpu=false", "batch_size=64", "input=a", "output=b", *changes])
    assert (config.workers, config.min_workers) == (3, None)
    assert isinstance(config, MaskedConfig)
    assert config.exact == rows
    assert type(config).model_validate(config.model_dump(mode="json")) == config  # as an evaluation reads it


@pytest.mark.parametrize("wrong", [0, -1, True, 2.5, "some"])
def test_rows_are_a_number_auto_or_null(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a whole number of at least 1, auto or null"):
        tiny.base_config(tmp_path, "tokens", exact_rows=wrong)


@pytest.mark.parametrize(
    ("zero", "times"),
    [({"stage": 3}, [4, 4, 12, 1]), ({"stage": 2}, [4, 4, 12, 1]), ({"stage": 2, "offload": True}, [4, 1, 1, 1])],
)
def test_a_plan_counts_the_sums_of_the_stages_that_have_them(
    zero: dict[str, Any], times: list[int], tmp_path: Path
) -> None:
    plain, elastic = (
        plan_of(tiny.base_config(tmp_path, "tokens", batch_size=64, model=PLANNED, zero=zero, workers=workers))
        for workers in (3, {"min": 1, "max": 3})
    )
    more = [elastic.memory(stage).gradients / plain.memory(stage).gradients for stage in range(4)]
    assert more == pytest.approx(times)
