"""MLflow's client, made late: importing MLflow takes seconds, and its global state is for others."""

import os
from typing import Any


def client_of(uri: str) -> Any:
    """An `MlflowClient` of runs and registry at a server, which does not try again by itself: callers know better."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)
