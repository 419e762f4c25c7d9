"""Requests that are all known to pictures, a batch of one shape at a time."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np

from raymuse.drawing.networks import Networks
from raymuse.drawing.scheduler import Picture, Scheduler, Ticket
from raymuse.drawing.tasks import Ids, Request

OnStep = Callable[[int, Ids], None]
"""Called after every step with its number and the base's ids (B, h, w), the mask id where one is still unknown."""


def draw(networks: Networks, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Picture]:
    """See `Pipeline.draw`."""
    if cut := networks.text.truncated(list(dict.fromkeys(request.prompt for request in requests))):
        warnings.warn(
            f"{len(cut)} prompts have more than {networks.text.length} tokens, and what is beyond is not read, as of: "
            f"{cut[0][:80]!r}",
            stacklevel=3,
        )
    scheduler, drawn = Scheduler(networks), dict[int, Picture]()
    for places in _batches(requests, networks.batch_size):
        tickets = [Ticket(requests[place]) for place in places]
        if on_step is not None:
            _watch(tickets, on_step)
        for ticket in tickets:
            scheduler.submit(ticket)
        numbers = dict(zip(tickets, places, strict=True))
        while scheduler.busy:
            for ticket, picture in scheduler.advance():
                if isinstance(picture, Exception):
                    raise picture
                drawn[numbers[ticket]] = picture
    return [drawn[place] for place in range(len(requests))]


def _watch(tickets: Sequence[Ticket], on_step: OnStep) -> None:
    """Tell `on_step` of all of a batch's ids whenever the last of those that are still drawn has gone its step."""
    ids = np.stack([ticket.request.base.ids for ticket in tickets])
    steps = [len(ticket.request.base.course.remaining) for ticket in tickets]
    gone = [0] * len(tickets)

    def stepped(row: int, now: Ids) -> None:
        ids[row] = now
        gone[row] += 1
        step = gone[row]
        if all(done >= min(step, of) for done, of in zip(gone, steps, strict=True)):
            on_step(step - 1, ids.copy())

    for row, ticket in enumerate(tickets):
        ticket.on_step = lambda now, row=row: stepped(row, now)


def _batches(requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Places of the requests that share a shape, at most so many at a time."""
    shapes = list(dict.fromkeys(request.shape for request in requests))
    order = sorted(range(len(requests)), key=lambda place: shapes.index(requests[place].shape))
    for _, group in groupby(order, key=lambda place: requests[place].shape):
        places = list(group)
        yield from (places[start : start + most] for start in range(0, len(places), most))
