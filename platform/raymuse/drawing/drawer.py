"""A thread that draws, and takes more in while it does."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue

import torch

from raymuse.drawing.networks import Networks
from raymuse.drawing.scheduler import Picture, Scheduler, Ticket


class Drawer:
    """Draws on a thread of its own, with one thread of computation: so sums do not depend on the number of cores.

    Attributes:
        load: pictures that are asked for and not done.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self._asked: dict[Ticket, Future[Picture]] = {}
        self._inbox: SimpleQueue[tuple[Ticket, Future[Picture]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        return len(self._asked) + self._inbox.qsize()

    def draw(self, ticket: Ticket) -> "Future[Picture]":
        """The picture to be; CancelledError where its ticket is cancelled. Nobody may ask after `close`."""
        future: Future[Picture] = Future()
        self._inbox.put((ticket, future))
        return future

    def close(self) -> None:
        """End the thread; what is not done is cancelled."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(1)
        scheduler = Scheduler(self.networks)
        while True:
            for asked in self._arrived(wait=not scheduler.busy):
                if asked is None:
                    self._end([*self._asked])
                    return
                ticket, future = asked
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    scheduler.submit(ticket)
                    self._asked[ticket] = future
                except Exception as error:
                    future.set_exception(error)
            for ticket, picture in scheduler.advance():
                if (asked_for := self._asked.pop(ticket, None)) is None:
                    continue  # cancelled before
                if isinstance(picture, Exception):
                    asked_for.set_exception(picture)
                else:
                    asked_for.set_result(picture)
            self._end([ticket for ticket in self._asked if ticket.cancelled])

    def _arrived(self, wait: bool) -> Iterator[tuple[Ticket, "Future[Picture]"] | None]:
        """All that is in the inbox; where `wait`, at least one."""
        if wait:
            yield self._inbox.get()
        while True:
            try:
                yield self._inbox.get_nowait()
            except Empty:
                return

    def _end(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._asked.pop(ticket).set_exception(CancelledError())
