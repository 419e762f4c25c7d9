"""What the API tells of itself: a line a request, and Prometheus metrics."""

import functools
import json
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.serve.context import _get_serve_request_context
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymuse.serving.protocol import Refused

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
        self.in_flight = Gauge("raymuse_pictures_in_flight", "pictures asked for, not done", registry=self.registry)

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return bytes(generate_latest(self.registry))


class Watched:
    """Bounds every request's body, counts it and prints a line of it: never its key, nor its prompt.

    The line has the id that Serve gives a request, the client's own `X-Request-Id` where it sends one, and that the
    answer repeats.

    Args:
        paths: those that are counted each; the others are counted together.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, paths: frozenset[str], most: int) -> None:
        self.app, self.metrics, self.paths, self.most = app, metrics(), paths, most

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
            answer: ASGIApp = self.app
            if (refused := self._too_long(dict(scope["headers"]))) is not None:
                answer = JSONResponse(refused.body, refused.status)
            await answer(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {
                "request_id": _get_serve_request_context().request_id,
                "method": scope["method"],
                "path": path,
                "status": status,
            }
            print(json.dumps({**line, "seconds": round(seconds, 4)}), flush=True)

    def _too_long(self, headers: dict[bytes, bytes]) -> Refused | None:
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers:
            return Refused(411, "the body has no Content-Length: send it in one piece")
        if length.isdigit() and int(length) > self.most:
            return Refused(413, f"a body of {int(length)} bytes: {self.most} are the limit")
        return None


@functools.cache
def metrics() -> Metrics:
    """This process's."""
    return Metrics()
