"""The cluster's one Serve, which all applications share: joined where it runs, started where it does not."""

import logging

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from raymuse.config.errors import UserError

ONLINE = "raymuse"  # the application that answers people
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)  # a batch job is a million requests


def join_serve() -> None:
    """Join the cluster's Serve, or start one without an HTTP port: handles alone reach what it deploys."""
    _quiet_here()
    if _get_global_client(raise_if_no_controller_running=False) is None:
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=QUIET)


def runs() -> bool:
    """Whether the cluster has a Serve."""
    _quiet_here()
    return _get_global_client(raise_if_no_controller_running=False) is not None


def serves_http(host: str, port: int) -> bool:
    """Whether the cluster's Serve listens there already.

    One that listens nowhere and holds no application (a finished batch job left it) is ended: only a new one can
    have a port.

    Raises:
        UserError: Serve runs with another address, which only its end could change.
    """
    _quiet_here()
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    runs = client.http_config
    if runs.location == ProxyLocation.Disabled:
        if not (applications := serve.status().applications):
            serve.shutdown()
            return False
        raise UserError(
            f"this cluster's Serve has no HTTP port while it runs {', '.join(applications)}; wait for their end, or "
            "end them with `serve shutdown`."
        )
    if (runs.host, runs.port) != (host, port):
        raise UserError(
            f"this cluster's Serve already listens on {runs.host}:{runs.port}, and can listen on no other address: "
            f"use host={runs.host} port={runs.port}."
        )
    return True


def start_http(host: str, port: int) -> None:
    """Start Serve with an HTTP port on the head node."""
    serve.start(
        proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port), logging_config=QUIET
    )


def leave_serve(application: str) -> None:
    """Take one application out, and end Serve where it was the last."""
    serve.delete(application)
    if not serve.status().applications:
        serve.shutdown()


def _quiet_here() -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
