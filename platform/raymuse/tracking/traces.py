"""A trace a request in MLflow: sent by a thread of its own, so that no request ever waits for the server.

MLflow itself says of a trace that it could not send no more than a line in the log: each is read back before it counts.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EXPERIMENT = "raymuse-serving"
MOST_WAITING = 1000  # traces that are kept while the server is away; what comes then is lost
TRIES = 3  # of a trace that a server does not take which is there
AGAIN_SECONDS, LONGEST_SECONDS = 1.0, 10.0
TAG = "request_id"


@dataclass
class Trace:
    """What happened to one request.

    Args:
        request_id: the one of its log line and its answer.
        name: of the trace, such as "POST /v1/images/generations".
        inputs: what was asked.
    """

    request_id: str
    name: str
    inputs: dict[str, Any]
    began: int = field(default_factory=time.time_ns)
    end: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    spans: list[tuple[str, int, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        began = time.time_ns()
        try:
            yield
        finally:
            self.spans.append((name, began, time.time_ns()))

    def ended(self, outputs: dict[str, Any]) -> "Trace":
        """The same, with what came of it; `error` in it means that it failed."""
        self.end, self.outputs = time.time_ns(), outputs
        return self


class Traces:
    """Sends traces to one MLflow server, in the order in which they come; again, while it is away.

    Args:
        uri: of the server.
        lost: called for each trace that the server will never have.
    """

    def __init__(self, uri: str, lost: Callable[[], object] = lambda: None) -> None:
        self.uri, self.lost = uri, lost
        self._experiment: str | None = None
        self._waiting: queue.Queue[Trace] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._run, name="traces", daemon=True).start()

    def send(self, trace: Trace) -> bool:
        """Have a trace sent; False where too many wait already, and this one is lost. Returns at once."""
        try:
            self._waiting.put_nowait(trace)
        except queue.Full:
            self.lost()
            return False
        return True

    def _run(self) -> None:
        os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # this thread is the queue
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        while True:
            if not self._sent(self._waiting.get()):
                self.lost()

    def _sent(self, trace: Trace) -> bool:
        """Whether the server has a trace: sent again until then, or until a server that is there will not take it."""
        import mlflow

        refused, pause = 0, AGAIN_SECONDS
        while refused < TRIES:
            if self._experiment is not None:
                try:
                    _log(trace, self._experiment)
                    return True
                except Exception as error:  # whatever is wrong with the server is no trouble of the requests'
                    _warn(trace, error)
                    refused += 1
            try:  # whether there is a server
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
                self._experiment = str(mlflow.set_experiment(name).experiment_id)
            except Exception as error:
                _warn(trace, error)
                self._experiment = None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_SECONDS)
        return False


def _warn(trace: Trace, error: Exception) -> None:
    print(f"warning: the trace of {trace.request_id} was not sent: {error}", file=sys.stderr, flush=True)


def _log(trace: Trace, experiment: str) -> None:
    """Send a trace, and read it back.

    Raises:
        Exception: of MLflow; the server does not have it, or not all of it.
    """
    import mlflow

    root = mlflow.start_span_no_context(
        trace.name,
        inputs=trace.inputs,
        tags={TAG: trace.request_id},
        experiment_id=experiment,
        start_time_ns=trace.began,
    )
    for name, began, ended in trace.spans:
        child = mlflow.start_span_no_context(name, parent_span=root, start_time_ns=began)
        child.end(end_time_ns=ended)
    root.end(outputs=trace.outputs, status="ERROR" if "error" in trace.outputs else "OK", end_time_ns=trace.end)
    arrived = mlflow.MlflowClient().get_trace(root.trace_id, display=False)
    if len(arrived.data.spans) != len(trace.spans) + 1:
        raise RuntimeError(f"{len(arrived.data.spans)} of its {len(trace.spans) + 1} spans arrived")
