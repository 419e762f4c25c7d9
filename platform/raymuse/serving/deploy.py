"""`raymuse serve`: the model behind HTTP, in the foreground, until Ctrl-C."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application

from raymuse.config.errors import UserError
from raymuse.config.generate import ServeConfig, models_of
from raymuse.config.load import from_values
from raymuse.pipeline import Pipeline
from raymuse.serving.api import Api, ServedAs
from raymuse.serving.checker import open_checker
from raymuse.serving.instance import ONLINE as APPLICATION
from raymuse.serving.instance import leave_serve, serves_http, start_http
from raymuse.serving.replicas import most_pictures, served
from raymuse.storage.prompts import DenyList
from raymuse.tracking.registry import with_model


def serve(config: ServeConfig) -> None:
    """Deploy, say where, and wait. Needs Ray.

    Raises:
        UserError: for a model that cannot be opened, a port that is taken, or a public address without a key.
    """
    port = config.port or free_port(config.host)
    keys = api_keys(config)
    if not keys and config.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"listening on {config.host} needs an API key: set api_key_file or RAYMUSE_API_KEY.")
    require_models(config)
    if not serves_http(config.host, port):
        require_free_port(config.host, port)
        start_http(config.host, port)
    deploy_api(config, keys)
    since = ray_serve.status().applications[APPLICATION].last_deployed_time_s
    try:
        if config.checker is None:
            print("pictures are not looked at before they are answered: checker=... has them checked", flush=True)
        for name, model in models_of(config).items():
            print(f"serving {name}: {model.model}", flush=True)
        print(f"  http://{config.host}:{port}/docs", flush=True)
        while True:
            time.sleep(1)
    finally:
        now = ray_serve.status().applications.get(APPLICATION)
        if now is not None and now.last_deployed_time_s == since:  # else another `raymuse serve` has taken it over
            leave_serve(APPLICATION)


def require_models(config: ServeConfig) -> None:
    """Open all that is to be served once, so that what is wrong shows here, before anything is deployed.

    Raises:
        UserError: for what cannot be opened.
    """
    for model in models_of(config).values():
        Pipeline.load(model.model, lora={**model.adapters, **dict.fromkeys(model.styles.values(), 1.0)})
    open_checker(config)
    DenyList.read(config.deny)


def application(values: dict[str, Any]) -> Application:
    """The API as Serve builds it from a file of its own (`serve deploy`, KubeRay's RayService).

    Args:
        values: what `raymuse serve` takes as words; `host` and `port` are the file's.

    Models are not opened here, where there may be no room for them: a replica that cannot open its own says so.

    Raises:
        UserError: for values that are wrong, a model that the registry does not give, or without an API key: such a
            service listens on every interface.
    """
    config = from_values("serve", values)
    assert isinstance(config, ServeConfig)
    keys = api_keys(config)
    if not keys:
        raise UserError("a service of the cluster needs an API key: set RAYMUSE_API_KEY for its pods, or api_key_file.")
    return bound_api(with_model(config, None), keys)


def deploy_api(config: ServeConfig, keys: Sequence[str]) -> None:
    """Run the API and the generator behind it as one Serve application."""
    ray_serve.run(bound_api(config, keys), name=APPLICATION, route_prefix="/")


def bound_api(config: ServeConfig, keys: Sequence[str]) -> Application:
    """The API with its generator, not yet deployed."""
    models = models_of(config)
    most = {name: most_pictures(model) for name, model in models.items()}
    told = {name: ServedAs(most[name], tuple(model.styles)) for name, model in models.items()}
    first, *others = models
    # The first keeps its deployment's name, whatever it is called: an update then takes its place without a gap.
    names = {first: "Generator", **{name: f"Generator-{name}" for name in others}}
    api = Api.options(  # type: ignore[attr-defined]
        max_ongoing_requests=2 * sum(most.values()) + 64,  # so that 429 is answered at once
        graceful_shutdown_timeout_s=config.deadline + 5,
    )
    generators = [served(config, model, names[name]) for name, model in models.items()]
    bound: Application = api.bind(told, keys, config.deadline, DenyList.read(config.deny), config.traces, *generators)
    return bound


def api_keys(config: ServeConfig) -> list[str]:
    """The keys of which clients must bring one: from a file, a line each, else the environment's one, else none.

    Raises:
        UserError: for a file that is missing or empty.
    """
    if config.api_key_file is None:
        key = os.environ.get("RAYMUSE_API_KEY", "").strip()
        return [key] if key else []
    path = Path(config.api_key_file)
    if not path.exists():
        raise UserError(f"api_key_file {path} does not exist.")
    keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not keys:
        raise UserError(f"api_key_file {path} is empty: an empty key would let everyone in.")
    return keys


def require_free_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host} is taken; choose another with port=..., or port=0 for any."
            ) from error


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
