"""A trace a request in MLflow: sent by a thread of its own, so that no request ever waits for the server."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

EXPERIMENT = "raymuse-serving"
MOST_WAITING = 1000  # traces that are kept while the server is away; what comes then is dropped
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
    """Sends traces to one MLflow server, in the order in which they come.

    Args:
        uri: of the server.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._waiting: queue.Queue[Trace] = queue.Queue(MOST_WAITING)
        threading.Thread(target=self._run, name="traces", daemon=True).start()

    def send(self, trace: Trace) -> bool:
        """Have a trace sent; False where too many wait already, and this one is dropped. Returns at once."""
        try:
            self._waiting.put_nowait(trace)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"  # this thread is the queue
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        experiment = None
        while True:
            trace = self._waiting.get()
            try:
                if experiment is None:
                    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
                    experiment = mlflow.set_experiment(name).experiment_id
                _log(trace, experiment)
            except Exception as error:  # whatever is wrong with the server is no trouble of the requests'
                print(f"warning: the trace of {trace.request_id} was not sent: {error}", file=sys.stderr, flush=True)


def _log(trace: Trace, experiment: str) -> None:
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
