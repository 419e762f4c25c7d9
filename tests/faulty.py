"""A network between a client and a real server that does what networks do: delays, lost answers, a wrong host."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Mood = Literal["well", "slow", "lossy", "refused", "cut"]


class Faulty:
    """Passes HTTP on to a port of this machine; inside `with` it listens on `port`.

    Attributes:
        mood: `slow`: every answer waits; `lossy`: a request is passed on, and its first answer lost; `refused`: it
            comes with another host's name, which MLflow's own check answers with 403; `cut`: none gets through.
    """

    def __init__(self, target: int, delay: float = 2.0) -> None:
        self.target, self.delay = target, delay
        self.mood: Mood = "well"
        self.seen: set[tuple[str, str, bytes]] = set()
        self.lost = 0
        self.cut_off = threading.Event()  # somebody was
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _pass(self) -> None:
                outer.answer(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815 - http.server names them

            def log_message(self, *_words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port

    def __enter__(self) -> "Faulty":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        """Ask the real server, and tell what it says, or not."""
        body = asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        if self.mood == "cut":
            self.cut_off.set()
            return self._hang_up(asked)
        if self.mood == "slow":
            time.sleep(self.delay)
        headers = {name: value for name, value in asked.headers.items() if name.lower() != "host"}
        headers["Host"] = "evil.example" if self.mood == "refused" else f"127.0.0.1:{self.target}"
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=120)
        connection.request(asked.command, asked.path, body, headers)
        said = connection.getresponse()
        data = said.read()
        connection.close()
        request = (asked.command, asked.path, body)
        if self.mood == "lossy" and request not in self.seen:
            self.seen.add(request)
            self.lost += 1
            return self._hang_up(asked)
        asked.send_response(said.status)
        for name, value in said.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                asked.send_header(name, value)
        asked.send_header("Content-Length", str(len(data)))
        asked.end_headers()
        asked.wfile.write(data)
        return None

    def _hang_up(self, asked: BaseHTTPRequestHandler) -> None:
        asked.close_connection = True
        asked.connection.close()
