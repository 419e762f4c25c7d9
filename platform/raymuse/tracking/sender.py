"""The thread that sends a spool to its MLflow server: in order, and again until it is acknowledged."""

import atexit
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from raymuse.tracking.delivery import Delivery, MissingError, RefusedError, UnacceptableError, UnreadyError
from raymuse.tracking.spool import Identity, Record, Segment, segments

LINGER_SECONDS = 1.0  # metrics of that long travel together
PAUSES = (0.5, 1.0, 2.0, 5.0)  # between attempts while the server is away
MISSING = "there is no such run"
REFUSED_SECONDS = 30.0
ADOPT_SECONDS = 30.0
EXIT_SECONDS = 5.0
BATCH = 250  # records; a record of metrics holds about ten

_SENDERS: dict[tuple[int, Path, str], "Sender"] = {}
_SENDERS_LOCK = threading.Lock()


def sender(spool: Path, uri: str) -> "Sender":
    """This process's sender for a spool and a server. A forked child gets its own: threads do not survive a fork."""
    place = (os.getpid(), spool, uri)
    with _SENDERS_LOCK:
        if place not in _SENDERS:
            _SENDERS[place] = Sender(spool, uri)
        return _SENDERS[place]


class Sender:
    """Spools records of any number of runs, and sends them from a daemon thread.

    Attributes:
        results: what the server answered to a record that has an `id` (a model version's number).
    """

    def __init__(self, spool: Path, uri: str) -> None:
        self.spool, self.uri = spool, uri
        self.results: dict[str, str] = {}
        self._delivery = Delivery(uri)
        self._own: dict[str, Segment] = {}
        self._closed: dict[str, Identity] = {}  # what was known of the runs whose segment is gone
        self._adopted: list[Segment] = []
        self._refused: dict[str, float] = {}  # a run's key -> when it was refused
        self._missing: set[str] = set()  # those among them that the server does not have
        self._down: str | None = None  # what the last failed attempt said, while the server is away
        self._failures = 0
        self._warned: set[str] = set()
        self._asking: set[str] = set()  # runs whose opener waits, and says itself that there is none to resume
        self._process = os.getpid()
        self._adopt_at = 0.0
        self._passed = threading.Condition()  # notified after each pass; its lock guards all of the above
        self._work, self._hurry = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="raymuse-tracking", daemon=True).start()
        atexit.register(self._last_words)

    def segment(self, identity: Identity) -> Segment:
        """This process's segment for a run, made when it is first asked for."""
        with self._passed:
            if identity.key not in self._own:
                self._own[identity.key] = Segment.create(self.spool, self._closed.get(identity.key, identity))
                self._work.set()
            return self._own[identity.key]

    def append(
        self, identity: Identity, record: Record, name: str = "", write: Callable[[Path], object] | None = None
    ) -> None:
        """Spools a record, with the file that `write` makes; a full disk costs the record, never the caller's work."""
        try:
            segment = self.segment(identity)
            if write is None:
                segment.append(record)
            else:
                segment.stash(record, name, write)
        except OSError as error:
            self._warn("disk", f"could not note {record['do']} of run {identity.name}: {error}. Is the disk full?")
        self._work.set()

    def known(self, identity: Identity) -> Identity:
        """The identity with what the server has told of it since (the run's id)."""
        segment = self._own.get(identity.key)
        return self._closed.get(identity.key, identity) if segment is None else segment.identity

    def settle(self, key: str, timeout: float) -> str | None:
        """Waits until a run is known to the server; returns why not when it is away or refuses, `None` otherwise."""
        self._asking.add(key)
        self._kick()
        with self._passed:
            self._passed.wait_for(lambda: self._own[key].done or self._down or key in self._refused, timeout)
            self._asking.discard(key)
            if key in self._missing:
                return MISSING
            if key in self._refused:
                return "refused"
            return None if self._own[key].done else self._down or f"no answer within {timeout:.0f} seconds"

    def flush(self, key: str, timeout: float) -> bool:
        """Waits until all records of a run have arrived, its dead writers' too; `False` when they have not."""
        with self._passed:
            self._adopt_at = 0.0
            self._refused.pop(key, None)  # it is asked once more
        self._kick()
        with self._passed:
            self._passed.wait_for(lambda: self._arrived(key) or key in self._refused, timeout)
            return self._arrived(key)

    def close(self, key: str) -> None:
        """Removes what this process holds of a run, once it has arrived; the rest stays for the next process."""
        with self._passed:
            if key in self._own and self._arrived(key):
                segment = self._own.pop(key)
                self._closed[key] = segment.identity
                segment.close()

    def discard(self, key: str) -> None:
        """Forgets a run that was never there, so that nothing of it is tried again."""
        with self._passed:
            segment = self._own.pop(key)
            self._refused.pop(key, None)
            self._missing.discard(key)
            shutil.rmtree(segment.folder, ignore_errors=True)
            segment.close()

    def _arrived(self, key: str) -> bool:
        own = self._own.get(key)
        names = {key} if own is None else own.identity.names
        left = any(segment.identity.names & names for segment in self._adopted)
        return self._adopt_at > 0 and not left and (own is None or own.done)

    def _kick(self) -> None:
        self._hurry.set()
        self._work.set()

    def _run(self) -> None:
        while True:
            self._work.wait(timeout=PAUSES[-1] if self._down else ADOPT_SECONDS)
            self._hurry.wait(self._pause())
            self._work.clear()
            self._hurry.clear()
            try:
                self._pass()
                self._failures, self._down = 0, None
                self._warned.discard("down")
            except Exception as error:
                self._failures += 1
                self._down = str(error) or type(error).__name__
                self._work.set()
                if self._failures > 1:  # a first attempt may meet a server that is just starting
                    self._warn_down(error)
            with self._passed:
                self._passed.notify_all()

    def _pause(self) -> float:
        """How long to let records gather, or to leave a server alone that is away."""
        return PAUSES[min(self._failures, len(PAUSES)) - 1] if self._failures else LINGER_SECONDS

    def _pass(self) -> None:
        """Sends everything once; a run that is refused keeps its later segments waiting, so that order holds."""
        self._adopt()
        with self._passed:
            waiting = [*self._adopted, *self._own.values()]
        blocked: set[str] = set()
        for segment in waiting:
            key, names = segment.identity.key, segment.identity.names
            if names & blocked or time.monotonic() < self._refused.get(key, -REFUSED_SECONDS) + REFUSED_SECONDS:
                blocked |= names
                continue
            try:
                self._drain(segment)
                self._refused.pop(key, None)
                self._missing.discard(key)
            except UnreadyError:
                blocked |= names
            except RefusedError as error:
                blocked |= names
                self._refused[key] = time.monotonic()
                is_missing = isinstance(error, MissingError)
                if is_missing:
                    self._missing.add(key)
                if not (is_missing and segment.identity.resumes and key in self._asking):
                    self._warn_refused(segment, error)
        if any(not segment.done and segment.identity.key not in self._refused for segment in waiting):
            self._work.set()

    def _adopt(self) -> None:
        """Takes over what writers that are gone left for this server."""
        if time.monotonic() < self._adopt_at:
            return
        held = {segment.folder for segment in [*self._adopted, *self._own.values()]}
        for folder in segments(self.spool):
            identity = None if folder in held else Segment.peek(folder)
            if identity is not None and self._wants(identity):
                segment = Segment.adopt(folder)
                if segment is not None:
                    with self._passed:
                        self._adopted.append(segment)
        with self._passed:
            self._adopt_at = time.monotonic() + ADOPT_SECONDS

    def _wants(self, identity: Identity) -> bool:
        """Whether a segment is for this server; a run that goes on here takes its records along from an old address."""
        own = set().union(*(segment.identity.names for segment in self._own.values()))
        return identity.uri == self.uri or bool(identity.names & own)

    def _drain(self, segment: Segment) -> None:
        """Sends what a segment holds, batch by batch."""
        self._delivery.open(segment)
        while pending := segment.pending():
            for records, offset in _batches(pending):
                self._send(segment, records)
                segment.acknowledge(records, offset)
        if segment.adopted and segment.done:
            with self._passed:
                self._adopted.remove(segment)
                segment.close()

    def _send(self, segment: Segment, records: list[Record]) -> None:
        """Sends one batch; where the server finds fault with it, record by record, setting aside the faulty ones."""
        try:
            for name, answer in self._delivery.send(segment, records).items():
                self.results[name] = answer
        except UnacceptableError as error:
            if len(records) > 1:
                for record in records:
                    self._send(segment, [record])
                return
            kept = segment.set_aside(records[0], str(error))
            self._warn(
                f"aside {segment.folder}",
                f"MLflow did not take {records[0]['do']} of run {segment.identity.name}: {error}. "
                f"It is kept in {kept}; everything else goes on",
            )

    def _warn_down(self, error: Exception) -> None:
        self._warn(
            "down",
            f"MLflow at {self.uri} is away ({_short(error)}). The work goes on; what is logged is kept in {self.spool} "
            "and sent when it is back, by this process or by the next that uses the same folder",
        )

    def _warn_refused(self, segment: Segment, error: Exception) -> None:
        self._warn(
            f"refused {segment.identity.key}",
            f"MLflow at {self.uri} refuses run {segment.identity.name} ({_short(error)}). Check the address, the "
            "permissions, the server's --allowed-hosts, and that the run was not deleted. Its records are kept in "
            f"{segment.folder} and tried again "
            f"every {REFUSED_SECONDS:.0f} seconds",
        )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            print(f"raymuse: {text}.", file=sys.stderr, flush=True)

    def _last_words(self) -> None:
        """Before the process ends: a moment for what is still under way, none for a server that is away."""
        for key in list(self._own):
            if self._process == os.getpid() and self._down is None and key not in self._refused:
                self.flush(key, EXIT_SECONDS)


def _batches(pending: list[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Neighbouring metrics together, everything else one by one; each with the offset behind it."""
    for is_metrics, group in groupby(pending, key=lambda item: item[0]["do"] == "metrics"):
        items = list(group)
        size = BATCH if is_metrics else 1
        for start in range(0, len(items), size):
            part = items[start : start + size]
            yield [record for record, _ in part], part[-1][1]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
