"""The order of the data: every row once an epoch, computed from the position alone, shared out without loss."""

import numpy as np
import pytest

from raymuse.training.order import SampleOrder, share

SIZES = [5, 1, 0, 12, 7, 3, 9, 2, 4, 11, 6, 1]


@pytest.mark.parametrize("window", [1, 3, 8, 50])
def test_every_epoch_visits_every_row_once_in_an_order_of_its_own(window: int) -> None:
    order = SampleOrder(SIZES, seed=4, window=window)
    epochs = order.rows(np.arange(3 * len(order))).reshape(3, -1)
    assert len(order) == sum(SIZES)
    for rows in epochs:
        assert sorted(rows) == list(range(sum(SIZES)))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.sort(epochs[0]))


def test_a_positions_row_does_not_depend_on_what_was_asked_before() -> None:
    positions = np.random.default_rng(0).permutation(5 * sum(SIZES))
    ordered = SampleOrder(SIZES, seed=4).rows(np.arange(len(positions)))
    assert np.array_equal(SampleOrder(SIZES, seed=4).rows(positions), ordered[positions])
    alone = [SampleOrder(SIZES, seed=4).rows(positions[row : row + 1])[0] for row in range(20)]
    assert alone == ordered[positions[:20]].tolist()


def test_a_position_far_into_the_training_costs_no_walk_there() -> None:
    order = SampleOrder([1000] * 100, seed=0)
    assert 0 <= order.rows(np.array([10**15]))[0] < 100_000


def test_another_seed_is_another_order() -> None:
    positions = np.arange(sum(SIZES))
    assert not np.array_equal(SampleOrder(SIZES, seed=1).rows(positions), SampleOrder(SIZES, seed=2).rows(positions))


def test_a_window_keeps_few_parts_open_at_once() -> None:
    order = SampleOrder([10] * 40, seed=0, window=4)
    parts = order.rows(np.arange(400)).reshape(10, 40) // 10
    assert all(len(set(window)) == 4 for window in parts.tolist())
    assert len({tuple(sorted(set(window))) for window in parts.tolist()}) == 10


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 12])
def test_shares_cover_a_batch_once_and_are_padded_with_weight_zero(world: int, batch: int) -> None:
    shares = [share(5, batch, rank, world) for rank in range(world)]
    positions, weights = (np.concatenate(column) for column in zip(*shares, strict=True))
    assert positions[weights == 1].tolist() == list(range(5 * batch, 6 * batch))  # in the order of the ranks
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert len({len(place) for place, _ in shares}) == 1
    assert set(positions.tolist()) == set(range(5 * batch, 6 * batch))  # padding repeats a row of the same batch
