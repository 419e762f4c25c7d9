"""The science: draws that depend on nothing but their place, hiding as trained, revealing as diffusers does."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from raymuse.masking import (
    CAPTION,
    CHOICE,
    CONFIDENCE,
    MASK,
    SCHEDULES,
    Rectangles,
    guidance_scales,
    guide,
    halton_ranks,
    hide,
    masked_counts,
    nucleus,
    reveal,
    temperatures,
    uniforms,
)

MASK_ID = 99
COUNTS = {
    256: [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0],
    1024: [1015, 989, 946, 886, 812, 724, 623, 512, 391, 265, 133, 0],
}


# --- draws


def test_a_row_of_draws_depends_on_seed_stream_and_position_alone() -> None:
    whole = uniforms(3, MASK, [5, 0, 2**40, 7], 9)
    assert np.array_equal(whole[2:3], uniforms(3, MASK, [2**40], 9))
    assert np.array_equal(whole[::-1], uniforms(3, MASK, [7, 2**40, 0, 5], 9))
    assert np.array_equal(whole[:, :4], uniforms(3, MASK, [5, 0, 2**40, 7], 4))
    for other in (uniforms(4, MASK, [5], 9), uniforms(3, CONFIDENCE, [5], 9), uniforms(3, MASK, [6], 9)):
        assert not np.intersect1d(whole, other).size


def test_draws_are_uniform_and_neighbours_are_independent() -> None:
    draws = uniforms(0, MASK, range(2000), 20)
    assert 0 <= draws.min() < draws.max() < 1
    counts = np.histogram(draws, 50, (0, 1))[0]
    assert chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 3 / math.sqrt(1999)


def test_draws_differ_for_the_largest_image_seeds() -> None:
    low, high = uniforms(2**63 - 1, CONFIDENCE, [0], 8), uniforms(2**63 - 2, CONFIDENCE, [0], 8)
    assert not np.array_equal(low, high)


@pytest.mark.parametrize(("seed", "stream"), [(0, MASK), (2**64 - 1, CAPTION)])
def test_draws_of_many_positions_at_once_are_those_of_each(seed: int, stream: int) -> None:
    positions = np.concatenate([np.arange(150), np.random.default_rng(0).integers(0, 2**63, 150)])
    alone = np.concatenate([uniforms(seed, stream, [position], 1) for position in positions])
    assert np.array_equal(uniforms(seed, stream, positions, 1), alone)
    assert np.array_equal(uniforms(seed, stream, positions, 5)[:, :1], alone)


# --- hiding


def hidden_counts(length: int, rows: int, schedule: str = "cosine", seed: int = 1) -> NDArray[np.int64]:
    ids = torch.arange(length).repeat(rows, 1)
    hidden = hide(ids, np.arange(rows), seed=seed, mask_id=length, schedule=schedule)
    assert torch.equal(hidden.mask, hidden.ids == length)
    assert torch.equal(hidden.ids[~hidden.mask], ids[~hidden.mask])
    return np.asarray(hidden.mask.sum(dim=1))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_hide_masks_exactly_what_the_schedule_says(schedule: str) -> None:
    u = uniforms(1, MASK, range(500), 1)[:, 0]
    wanted = [max(1, round(17 * SCHEDULES[schedule](value))) for value in u]
    assert hidden_counts(17, 500, schedule).tolist() == wanted


def test_the_mean_masking_ratio_is_two_over_pi() -> None:
    ratios = hidden_counts(256, 4000) / 256
    deviation = math.sqrt(0.5 - (2 / math.pi) ** 2)  # of cos(u pi / 2)
    assert abs(ratios.mean() - 2 / math.pi) < 3 * deviation / math.sqrt(4000)
    assert ratios.std() == pytest.approx(deviation, rel=0.05)


def test_every_position_is_masked_equally_often() -> None:
    ids = torch.zeros(4000, 16, dtype=torch.long)
    often = hide(ids, np.arange(4000), seed=5, mask_id=1).mask.sum(dim=0).numpy()
    assert chisquare(often).pvalue > 1e-3


def test_a_sample_is_masked_alike_in_any_batch() -> None:
    ids = torch.arange(64).repeat(5, 1)
    places = np.array([900, 3, 41, 7, 8])
    whole = hide(ids, places, seed=2, mask_id=MASK_ID).mask
    for row, place in enumerate(places):
        assert torch.equal(hide(ids[:1], np.array([place]), seed=2, mask_id=MASK_ID).mask[0], whole[row])
    assert not torch.equal(hide(ids, places, seed=3, mask_id=MASK_ID).mask, whole)


def test_min_ratio_is_the_least_share_that_is_masked() -> None:
    ids = torch.zeros(300, 40, dtype=torch.long)
    counts = hide(ids, np.arange(300), seed=0, mask_id=1, min_ratio=0.6).mask.sum(dim=1)
    assert counts.min() == 24
    assert counts.max() == 40


def test_rectangles_take_the_share_of_samples_asked_for() -> None:
    count, grid = 2000, (12, 16)
    ids = torch.zeros(count, grid[0] * grid[1], dtype=torch.long)
    places = np.arange(count)
    plain = hide(ids, places, seed=4, mask_id=1).mask.numpy()
    mixed = hide(ids, places, seed=4, mask_id=1, rectangles=Rectangles(0.3, grid)).mask.numpy()
    changed = (plain != mixed).any(axis=1)
    rectangles = np.array([_is_rectangle(mask.reshape(grid)) for mask in mixed])
    assert abs(rectangles.mean() - 0.3) < 3 * math.sqrt(0.3 * 0.7 / count) + 0.01  # one or two cells are one anyhow
    assert rectangles[changed].all()
    wanted, found = plain[changed].sum(axis=1), mixed[changed].sum(axis=1)
    assert np.abs(found / wanted - 1).mean() < 0.1
    assert np.corrcoef(wanted, found)[0, 1] > 0.98
    assert (mixed[changed].sum(axis=0) > 0).all()  # they lie everywhere
    alone = hide(ids[:1], places[7:8], seed=4, mask_id=1, rectangles=Rectangles(0.3, grid)).mask.numpy()
    assert np.array_equal(alone[0], mixed[7])


def _is_rectangle(mask: NDArray[np.bool_]) -> bool:
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


# --- how many stay masked


@pytest.mark.parametrize("length", sorted(COUNTS))
def test_masked_counts_are_the_published_ones(length: int) -> None:
    assert masked_counts(length, 12) == COUNTS[length]


def fixed_logits(length: int, codes: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Near one-hot logits: what is drawn is as good as certain, and the confidences of a row all differ in fp32."""
    draw = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(length, generator=draw) for _ in range(batch)])
    doubt = 6e-7 * (ranks + 1)  # what is left for all the other codes: ten times the spacing of floats below 1
    peaks = torch.nn.functional.one_hot(torch.randint(codes, (batch, length), generator=draw), codes)
    logits = peaks * ((codes - 1) / doubt).log()[..., None]
    assert all(len(row.unique()) == length for row in logits.softmax(dim=-1).amax(dim=-1))
    return logits


def scheduler_run(logits: Tensor, ids: Tensor, steps: int, schedule: str) -> list[Tensor]:
    scheduler = AmusedScheduler(mask_token_id=MASK_ID, masking_schedule=schedule)
    scheduler.set_timesteps(steps, temperature=(0, 0))
    seen = []
    for step in scheduler.timesteps:
        ids = scheduler.step(logits, step, ids, generator=torch.Generator().manual_seed(0)).prev_sample
        seen.append(ids)
    return seen


def reveal_run(logits: Tensor, ids: Tensor, steps: int, schedule: str) -> list[Tensor]:
    seen = []
    for step, count in enumerate(masked_counts(ids.shape[1], steps, schedule)):
        choice, confidence = (
            torch.from_numpy(uniforms(0, stream, [step] * len(ids), ids.shape[1])) for stream in (5, 6)
        )
        remaining = torch.full((len(ids),), count)
        ids = reveal(logits, ids, choice, confidence, remaining, torch.zeros(len(ids)), mask_id=MASK_ID)
        seen.append(ids)
    return seen


@pytest.mark.parametrize(("length", "steps", "schedule"), [(256, 11, "cosine"), (64, 40, "cosine"), (64, 9, "linear")])
def test_every_step_without_noise_gives_the_ids_of_diffusers(length: int, steps: int, schedule: str) -> None:
    """Also with so many steps that one reveals less than an id, and where some ids are known from the start."""
    logits = fixed_logits(length, 20, batch=2)
    start = torch.full((2, length), MASK_ID)
    start[1, : length // 3] = 3
    ours, theirs = (run(logits, start, steps, schedule) for run in (reveal_run, scheduler_run))
    for step, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, wanted), f"step {step}"


@pytest.mark.parametrize("length", sorted(COUNTS))
def test_masked_counts_are_those_of_diffusers(length: int) -> None:
    """But for one id at two thirds of the way: fp32 makes cos(pi / 3) a little less than a half there."""
    logits = fixed_logits(length, 20)
    for steps in (1, 2, 8, 11, 12, 20, 24):
        start = torch.full((1, length), MASK_ID)
        theirs = [int((ids == MASK_ID).sum()) for ids in scheduler_run(logits, start, steps, "cosine")]
        rounded = {2 * steps / 3: 1}
        ours = [count - rounded.get(step + 1, 0) for step, count in enumerate(masked_counts(length, steps))]
        assert theirs == ours, steps


# --- revealing


def test_known_ids_are_never_touched() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.where(torch.rand(50, 30, generator=draw) < 0.5, MASK_ID, torch.randint(20, (50, 30), generator=draw))
    noise = [torch.rand(50, 30, generator=draw, dtype=torch.float64) for _ in range(2)]
    remaining, heat = torch.arange(50) % 31, torch.linspace(0, 50, 50)
    drawn = reveal(torch.randn(50, 30, 20, generator=draw), ids, *noise, remaining, heat, mask_id=MASK_ID)
    known = ids != MASK_ID
    assert torch.equal(drawn[known], ids[known])
    unknown = (~known).sum(dim=1)
    left = torch.where(remaining > 0, torch.minimum(remaining, unknown - 1).clamp(min=1), 0)
    assert torch.equal((drawn == MASK_ID).sum(dim=1), left)
    assert ((drawn < 20) | (drawn == MASK_ID)).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.95, 4), (1.0, 4)])
def test_a_nucleus_is_the_fewest_likeliest_codes(top_p: float, kept: int) -> None:
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    wanted = torch.zeros(1, 4, dtype=torch.float64)
    likeliest = [1, 3, 2, 0][:kept]
    wanted[:, likeliest] = probabilities[:, likeliest]
    torch.testing.assert_close(nucleus(probabilities, top_p), wanted)


def test_codes_outside_the_nucleus_are_never_drawn() -> None:
    count = 4000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(1, count, 4)
    choice = torch.from_numpy(uniforms(3, CHOICE, [0], count))
    ids, zero = torch.full((1, count), 99), torch.zeros(1)
    drawn = reveal(logits, ids, choice, torch.full_like(choice, 0.5), zero.long(), zero, mask_id=99, top_p=0.6)
    shares = drawn.flatten().bincount(minlength=4) / count
    assert shares[[0, 2]].tolist() == [0, 0]
    assert shares[1] == pytest.approx(4 / 7, abs=0.03)


def test_codes_are_drawn_as_softmax_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    count = 20_000
    choice = torch.from_numpy(uniforms(0, 5, [0], count))
    ids = torch.full((1, count), MASK_ID)
    zero = torch.zeros(1)
    drawn = reveal(logits.expand(1, count, 6), ids, choice, torch.full_like(choice, 0.5), zero.long(), zero, mask_id=99)
    seen = np.bincount(drawn[0].numpy(), minlength=6)
    assert chisquare(seen, logits.double().softmax(0).numpy() * count).pvalue > 1e-3


@pytest.mark.parametrize("u", [0.0, 1 - 1e-12])
def test_a_code_of_probability_zero_is_never_drawn(u: float) -> None:
    logits = torch.tensor([-math.inf, 0.3, 0.1, -math.inf, -math.inf]).expand(1, 4, 5)
    choice = torch.full((1, 4), u, dtype=torch.float64)
    ids = torch.full((1, 4), MASK_ID)
    drawn = reveal(logits, ids, choice, choice, torch.zeros(1).long(), torch.zeros(1), mask_id=MASK_ID)
    assert drawn.unique().tolist() == [1 if u == 0 else 2]


def test_confidence_noise_orders_ids_as_gumbel_top_k_does() -> None:
    """With temperature 1 the id that is kept of two is drawn from their probabilities (Gumbel-max)."""
    count = 6000
    logits = torch.tensor([[4.0, 0.0], [0.0, 0.0]]).expand(count, 2, 2)
    half, noise = torch.full((count, 2), 1e-9, dtype=torch.float64), torch.from_numpy(uniforms(0, 6, range(count), 2))
    one, ids = torch.ones(count), torch.full((count, 2), MASK_ID)
    drawn = reveal(logits, ids, half, noise, one.long(), one, mask_id=MASK_ID)
    p, q = torch.sigmoid(torch.tensor(4.0)).item(), 0.5
    kept = int((drawn[:, 0] != MASK_ID).sum())
    assert abs(kept - count * p / (p + q)) < 3 * math.sqrt(count * p * q) / (p + q)


def test_rows_of_one_batch_at_different_steps_equal_each_row_alone() -> None:
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 40, 12, generator=draw) * 2
    ids = torch.where(torch.rand(6, 40, generator=draw) < 0.7, MASK_ID, 1)
    noise = [torch.rand(6, 40, generator=draw, dtype=torch.float64) for _ in range(2)]
    remaining, heat = torch.tensor([0, 1, 5, 20, 39, 3]), torch.tensor([0.0, 2.0, 0.5, 1.0, 9.0, 0.1])
    whole = reveal(logits, ids, *noise, remaining, heat, mask_id=MASK_ID)
    for row in range(6):
        one = slice(row, row + 1)
        alone = reveal(logits[one], ids[one], noise[0][one], noise[1][one], remaining[one], heat[one], mask_id=MASK_ID)
        assert torch.equal(alone[0], whole[row])


def test_temperatures_fall_linearly_to_zero() -> None:
    assert temperatures(2.0, 5) == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert temperatures(2.0, 1) == [2.0]


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, [1.0, 2.0]), (1.0, [3.0, 5.0]), (4.0, [9.0, 14.0])])
def test_guidance_goes_on_from_the_unconditional_logits(scale: float, wanted: Sequence[float]) -> None:
    assert guide(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0]), scale).tolist() == wanted


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules_fall_from_all_to_none(schedule: str) -> None:
    values = [SCHEDULES[schedule](r) for r in np.linspace(0, 1, 101)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert (np.diff(values) < 0).all()


def test_guidance_rises_over_the_steps_and_ends_with_its_span() -> None:
    assert guidance_scales(5, 4) == [5, 5, 5, 5]
    assert guidance_scales(5, 4, "linear") == [2, 3, 4, 5]
    np.testing.assert_allclose(guidance_scales(5, 2, "cosine"), [3, 5])
    assert guidance_scales(5, 4, span=(0.0, 0.5)) == [5, 5, 1, 1]
    assert guidance_scales(5, 4, span=(0.25, 0.75)) == [1, 5, 5, 1]


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (5, 12), (1, 7)])
def test_halton_ranks_are_an_order_that_spreads(grid: tuple[int, int]) -> None:
    ranks = halton_ranks(*grid)
    assert sorted(ranks) == list(range(grid[0] * grid[1]))
    if grid == (16, 16):  # of the first 16 cells each is alone in its quarter of a quarter
        first = np.argwhere(ranks.reshape(grid) < 16) // 4
        assert len({tuple(cell) for cell in first}) >= 13


@pytest.mark.parametrize(("top_k", "drawn"), [(1, {2}), (2, {0, 2}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3})])
def test_only_the_likeliest_codes_are_drawn(top_k: int, drawn: set[int]) -> None:
    logits = torch.tensor([2.0, 1.0, 3.0, 0.5]).expand(1, 4000, 4)
    choice = torch.from_numpy(uniforms(0, CHOICE, [0], 4000))
    ids = reveal(
        logits,
        torch.full((1, 4000), 9),
        choice,
        choice,
        torch.tensor([0]),
        torch.tensor([0.0]),
        mask_id=9,
        top_k=top_k,
    )
    assert set(ids.unique().tolist()) == drawn


def test_a_priority_takes_the_place_of_the_confidence() -> None:
    logits, noise = fixed_logits(8, 5), torch.full((1, 8), 0.5)
    priority = torch.tensor([[3.0, 7, 1, 0, 6, 2, 5, 4]])
    ids = torch.full((1, 8), 9)
    ids[0, 3] = 1
    after = reveal(logits, ids, noise, noise, torch.tensor([5]), torch.tensor([2.0]), mask_id=9, priority=priority)
    assert (after == 9).tolist() == [[True, False, True, False, False, True, True, True]]
