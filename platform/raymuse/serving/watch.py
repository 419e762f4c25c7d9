"""What the API tells of itself: a request's id, a line a request, and Prometheus metrics."""

import functools
import json
import re
import secrets
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raymuse.serving.protocol import Refused

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


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
        return generate_latest(self.registry)


class Watched:
    """Gives every request an id, bounds its body, counts it and prints a line of it: never its key, nor its prompt.

    The id is the client's own `X-Request-Id` where it sends one; the answer repeats it.

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
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _ID.fullmatch(given) else b"req_" + secrets.token_hex(12).encode()
        path = scope["path"] if scope["path"] in self.paths else "other"
        began, status = time.perf_counter(), 499  # as nginx says: the client went away

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name)]
            await send(message)

        try:
            answer: ASGIApp = self.app
            if (refused := self._too_long(headers)) is not None:
                answer = JSONResponse(refused.body, refused.status)
            await answer(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {"request_id": name.decode(), "method": scope["method"], "path": path, "status": status}
            print(json.dumps({**line, "seconds": round(seconds, 4)}), flush=True)

    def _too_long(self, headers: dict[bytes, bytes]) -> Refused | None:
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers and not length:
            return Refused(411, "the body has no Content-Length: send it in one piece")
        if length.isdigit() and int(length) > self.most:
            return Refused(413, f"a body of {int(length)} bytes: {self.most} are the limit")
        return None


@functools.cache
def metrics() -> Metrics:
    """This process's."""
    return Metrics()
