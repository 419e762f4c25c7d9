"""What the API tells of itself: a line a request, and Prometheus metrics."""

import functools
import json
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.serve.context import _get_serve_request_context
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_ID = 200  # characters of a client's own that are told on
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts of one API replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("raymuse_requests", "HTTP requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "raymuse_request_seconds", "to the end of the answer", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.pictures = Counter("raymuse_pictures", "pictures drawn", registry=self.registry)
        self.refused = Counter("raymuse_pictures_refused", "pictures that the checker refused", registry=self.registry)
        self.traces_lost = Counter("raymuse_traces_lost", "traces that MLflow never got", registry=self.registry)
        self.in_flight = Gauge("raymuse_pictures_in_flight", "pictures asked for, not done", registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return bytes(generate_latest(self.registry))


class Watched:
    """Counts every request and prints a line of it: never its key, nor its prompt.

    Args:
        paths: those that are counted each; the others are counted together.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics(), paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        began, status = time.perf_counter(), 499  # as nginx says: the client went away

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {"request_id": request_id(), "method": scope["method"], "path": path, "status": status}
            print(json.dumps({**line, "seconds": round(seconds, 4)}), flush=True)


def request_id() -> str:
    """The id that Serve gives a request, or the client's own `X-Request-Id`; the answer repeats it."""
    return str(_get_serve_request_context().request_id)[:LONGEST_ID]


@functools.cache
def metrics() -> Metrics:
    """This process's."""
    return Metrics()
