"""Pictures that come and go while others are drawn are those that each is alone."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from raymuse.config.sampling import SamplingConfig
from raymuse.drawing import scheduler as scheduling
from raymuse.drawing.drawer import Drawer
from raymuse.drawing.sampler import Course, Rows
from raymuse.drawing.scheduler import MOST_LANES, REMEMBERED, Picture, Scheduler, Ticket
from raymuse.drawing.tasks import Request
from raymuse.pipeline import Pipeline

PROMPTS = ["a small red circle", "", "a large blue square", "a star", "a yellow triangle", "a gray background"]
OPTIONS: list[dict[str, Any]] = [{"steps": 2}, {"guidance": 1.0}, {"steps": 7, "guidance": 4.0}, {}, {"steps": 1}, {}]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


@pytest.fixture(scope="module", params=["base", "cascade"])
def pipeline(request: pytest.FixtureRequest, encoders: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model") / "model"
    return Pipeline.load(tiny.write_model(folder, encoders, cascade=request.param == "cascade"), batch_size=8)


def requests(pipeline: Pipeline) -> list[Request]:
    return [
        pipeline.request(prompt, seed, **options)
        for seed, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS, strict=True))
    ]


def finish(scheduler: Scheduler) -> dict[Ticket, Picture]:
    done: dict[Ticket, Picture] = {}
    while scheduler.busy:
        done.update(scheduler.advance())
    return done


def same(one: Picture, other: Picture) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("pixels", "base_pixels", "ids", "base_ids")
    )


def test_pictures_that_join_midway_are_those_drawn_alone(pipeline: Pipeline) -> None:
    asked = requests(pipeline) * 4
    alone = [pipeline.draw([request])[0] for request in asked[: len(PROMPTS)]] * 4
    scheduler, tickets, done = Scheduler(pipeline), [Ticket(request) for request in asked], {}
    for ticket in tickets:  # three times as many as there are rows, one more with every step
        scheduler.submit(ticket)
        done.update(scheduler.advance())
    assert 0 < len(done) < len(tickets)
    done |= finish(scheduler)
    assert all(same(done[ticket], wanted) for ticket, wanted in zip(tickets, alone, strict=True))
    assert scheduler.advance() == []


def watch(monkeypatch: pytest.MonkeyPatch, network: Any, method: str) -> list[int]:
    """The rows of each call of a network's method."""
    call, seen = getattr(network, method), list[int]()

    def watching(*given: Any, **named: Any) -> Any:
        seen.append(len(given[0] if given else next(iter(named.values()))))
        return call(*given, **named)

    monkeypatch.setattr(network, method, watching)
    return seen


def test_every_call_of_a_network_has_as_many_rows(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    features = watch(monkeypatch, pipeline.base, "features")
    decoded = watch(monkeypatch, pipeline.vqgan.network, "draw")
    read = watch(monkeypatch, pipeline.text.network, "forward")
    scheduler = Scheduler(pipeline)
    for request in requests(pipeline):
        scheduler.submit(Ticket(request))
        scheduler.advance()
    finish(scheduler)
    assert set(features) <= {8, 16}  # with guidance twice the rows
    assert set(decoded) == set(read) == {2}


def test_urgent_pictures_are_begun_first(pipeline: Pipeline) -> None:
    scheduler = Scheduler(pipeline)
    tickets = [Ticket(pipeline.request("a star", seed), urgent=seed >= 20) for seed in range(24)]
    for ticket in tickets:
        scheduler.submit(ticket)
    order = list(finish(scheduler))
    assert set(order[:4]) == set(tickets[20:])
    assert order[4:] == tickets[:20]


def test_many_shapes_wait_for_a_lane_and_none_overtakes(pipeline: Pipeline) -> None:
    cell = pipeline.settings.size // 4
    sizes = [(width * cell, height * cell) for width in (1, 2, 3) for height in (1, 2, 3)] * 2
    asked = [pipeline.request("a star", seed, size=size) for seed, size in enumerate(sizes)]
    alone = [pipeline.draw([request])[0] for request in asked]
    scheduler, most = Scheduler(pipeline), 0
    tickets = [Ticket(request) for request in asked]
    for ticket in tickets:
        scheduler.submit(ticket)
    tickets[0].cancelled = True
    tickets[5].cancelled = True  # one that has a lane, and one that waits for one
    done: dict[Ticket, Picture | Exception] = {}
    while scheduler.busy:
        most = max(most, len(scheduler._lanes))
        done.update(scheduler.advance())
    assert most == MOST_LANES
    assert set(tickets) - set(done) == {tickets[0], tickets[5]}
    assert all(same(done[one], alone[place]) for place, one in enumerate(tickets) if one in done)  # type: ignore[arg-type]
    first = {ticket: place for place, ticket in enumerate(done)}
    assert max(first[one] for one in tickets[1:4]) < min(first[one] for one in tickets[6:9])


def test_a_shape_that_finds_no_memory_fails_alone(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, scheduler, make = pipeline.settings.size // 4, Scheduler(pipeline), scheduling._rows
    sizes = [(width * cell, height * cell) for width in (1, 2, 3, 4) for height in (1, 2)][:7]
    tickets = [Ticket(pipeline.request("a star", 1, size=size, steps=2)) for size in sizes]
    refused = [tickets[place].request.base.ids.shape for place in (1, 5)]

    def full(networks: Any, network: Any, like: Any, *more: Any) -> Any:
        if network is pipeline.base and like.ids.shape in refused:
            raise torch.OutOfMemoryError("full")
        return make(networks, network, like, *more)

    monkeypatch.setattr(scheduling, "_rows", full)
    scheduler.submit(tickets[0])
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        scheduler.submit(tickets[1])
    for ticket in tickets[2:]:
        scheduler.submit(ticket)  # the last two wait for a lane
    done: dict[Ticket, Picture | Exception] = {}
    while scheduler.busy:
        done.update(scheduler.advance())
    assert set(done) == {*tickets} - {tickets[1]}
    assert [ticket for ticket in done if isinstance(done[ticket], torch.OutOfMemoryError)] == [tickets[5]]


def test_what_is_cancelled_is_not_drawn_and_its_row_is_another_s(pipeline: Pipeline) -> None:
    scheduler, steps = Scheduler(pipeline), []
    tickets = [Ticket(pipeline.request("a star", seed), on_step=steps.append) for seed in range(20)]
    for ticket in tickets:
        scheduler.submit(ticket)
    scheduler.advance()
    for ticket in tickets[:8] + tickets[12:]:  # all eight that have begun, and eight that wait
        ticket.cancelled = True
    steps.clear()
    assert list(finish(scheduler)) == tickets[8:12]
    assert len(steps) == 4 * SamplingConfig.model_validate(pipeline.settings.base.model_dump()).steps


def test_what_is_cancelled_is_forgotten_while_others_are_drawn(pipeline: Pipeline) -> None:
    scheduler, stays = Scheduler(pipeline), Ticket(pipeline.request("a star", 1, steps=9))
    leaves = Ticket(pipeline.request("a star", 2, steps=9))
    for ticket in (stays, leaves):
        scheduler.submit(ticket)
    scheduler.advance()
    leaves.cancelled, gone = True, weakref.ref(leaves)
    del leaves, ticket
    for _ in range(2):
        scheduler.advance()
    gc.collect()
    assert gone() is None
    assert list(finish(scheduler)) == [stays]


def test_each_step_of_a_picture_is_told(pipeline: Pipeline) -> None:
    seen: list[np.ndarray] = []
    scheduler = Scheduler(pipeline)
    for number, request in enumerate(requests(pipeline)):
        scheduler.submit(Ticket(request, on_step=seen.append if number == 2 else None))
        scheduler.advance()
    done = {ticket.request.seed: picture for ticket, picture in finish(scheduler).items()}
    left = [int((ids == pipeline.base.config.mask_id).sum()) for ids in seen]
    assert len(left) == 7
    assert left == sorted(left, reverse=True)
    np.testing.assert_array_equal(seen[-1], done[2].base_ids)


def test_shapes_take_turns(pipeline: Pipeline) -> None:
    side, scheduler, told = pipeline.settings.size, Scheduler(pipeline), list[str]()
    tickets = [
        Ticket(pipeline.request("a star", 1, size=size, steps=3), on_step=lambda _, name=name: told.append(name))
        for name, size in (("flat", (side, side // 2)), ("square", (side, side)))
    ]
    for ticket in tickets:
        scheduler.submit(ticket)
    done = finish(scheduler)
    assert told == ["flat", "square"] * 3
    assert all(same(done[ticket], pipeline.draw([ticket.request])[0]) for ticket in tickets)


def test_prompts_are_encoded_once_and_forgotten_in_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, scheduler = watch(monkeypatch, pipeline.text.network, "forward"), Scheduler(pipeline)

    def draw(prompt: str) -> int:
        """How often text was read for it."""
        before = len(calls)
        scheduler.submit(Ticket(pipeline.request(prompt, 5, steps=1)))
        finish(scheduler)
        return len(calls) - before

    assert [draw(prompt) for prompt in ("a star", "", "a star", "a circle", "a circle")] == [1, 0, 0, 1, 0]
    assert sum(draw(f"star {number}") for number in range(REMEMBERED)) == REMEMBERED
    assert draw("a star") == 1


def test_rows_at_other_steps_of_longer_courses_change_nothing(pipeline: Pipeline) -> None:
    """The step itself: a row that waits, one that has ended and one whose neighbour is admitted with 40 more steps."""
    network, side = pipeline.base, pipeline.settings.base_size // pipeline.vqgan.factor
    states, pooled = pipeline.text(["a star", "a red circle"])
    micro = torch.tensor([[16.0, 16, 0, 0, 6]] * 2)
    condition = network.condition(states, pooled, micro)
    blank = torch.full((2, side, side), network.config.mask_id)
    few, many = (Course.of(SamplingConfig(steps=steps, guidance=1.0), side * side) for steps in (3, 40))

    def drawn(late: int) -> torch.Tensor:
        rows = Rows(network, (4, side, side), at_once=2)
        rows.admit([2], condition, None, ids=blank[:1], seeds=[7], courses=[few])
        for step in range(50):
            if step == late:
                rows.admit([1, 0], condition, None, ids=blank, seeds=[7, 8], courses=[few, many])
            rows.step()
        assert all(rows.ended(row) for row in range(4))
        return rows.ids

    early, later = drawn(0), drawn(2)
    assert torch.equal(early, later)
    assert torch.equal(early[1], early[2])
    assert not (early == network.config.mask_id).any()
    assert (early[3] == 0).all()


def test_a_pass_of_rows_without_a_picture_is_left_out(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a core; and pictures that come later go where a pass is made anyway."""
    cells = (pipeline.settings.base_size // pipeline.vqgan.factor) ** 2
    monkeypatch.setattr("raymuse.drawing.sampler.CORE_CELLS", 2 * cells)  # two rows of the base
    passes, features = [], pipeline.base.features
    monkeypatch.setattr(
        pipeline.base, "features", lambda ids, *known: (passes.append(len(ids)), features(ids, *known))[1]
    )
    scheduler = Scheduler(pipeline)
    tickets = [Ticket(pipeline.request("a star", seed, steps=5)) for seed in range(4)]
    counts = []
    for now in (tickets[:1], tickets[1:2], [], tickets[2:]):
        for ticket in now:
            scheduler.submit(ticket)
        passes.clear()
        assert scheduler.advance() == []
        counts.append(list(passes))
    assert counts == [[4], [4], [4], [4, 4]]  # each with its guidance
    done = finish(scheduler)
    alone = pipeline.draw([ticket.request for ticket in tickets])
    assert all(same(done[ticket], picture) for ticket, picture in zip(tickets, alone, strict=True))


# --- the thread


@pytest.fixture
def drawer(pipeline: Pipeline) -> Iterator[Drawer]:
    drawer = Drawer(pipeline)
    yield drawer
    drawer.close()


def test_a_drawer_draws_what_many_threads_ask_for(pipeline: Pipeline, drawer: Drawer) -> None:
    asked = requests(pipeline)
    with ThreadPoolExecutor(6) as pool:
        futures = list(pool.map(lambda request: drawer.draw(Ticket(request)), asked * 3))
    alone = pipeline.draw(asked)
    assert all(same(future.result(60), alone[number % 6]) for number, future in enumerate(futures))
    assert drawer.load == 0


def test_a_failure_is_told_to_all_that_were_asked_for_and_the_next_are_drawn(
    pipeline: Pipeline, drawer: Drawer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = requests(pipeline)[0]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.base, "features", lambda *_: 1 / 0)
        failed = [drawer.draw(Ticket(request)) for _ in range(3)]
        for future in failed:
            with pytest.raises(ZeroDivisionError):
                future.result(60)
    assert same(drawer.draw(Ticket(request)).result(60), pipeline.draw([request])[0])


def test_a_cancelled_picture_is_told_to_be_and_costs_no_step(pipeline: Pipeline, drawer: Drawer) -> None:
    begun, steps = threading.Event(), list[np.ndarray]()

    def on_step(ids: np.ndarray) -> None:
        steps.append(ids)
        begun.set()

    ticket = Ticket(pipeline.request("a star", 1, steps=256), on_step=on_step)
    future = drawer.draw(ticket)
    assert begun.wait(60)
    ticket.cancelled = True
    with pytest.raises(CancelledError):
        future.result(60)
    assert len(steps) < 256
    waits = drawer.draw(Ticket(pipeline.request("a star", 1), cancelled=True))
    with pytest.raises(CancelledError):
        waits.result(60)
    assert drawer.load == 0


def test_a_closed_drawer_leaves_nobody_waiting(pipeline: Pipeline) -> None:
    drawer = Drawer(pipeline)
    future = drawer.draw(Ticket(pipeline.request("a star", 1, steps=256)))
    drawer.close()
    with pytest.raises(CancelledError):
        future.result(1)
