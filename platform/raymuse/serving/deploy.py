"""`raymuse serve`: the model behind HTTP, in the foreground, until Ctrl-C."""

import os
import socket
import time
from pathlib import Path

from ray import serve as ray_serve

from raymuse.config.errors import UserError
from raymuse.config.generate import ServeConfig
from raymuse.pipeline import Pipeline
from raymuse.serving.api import Api
from raymuse.serving.generator import deployed
from raymuse.serving.instance import leave_serve, serves_http, start_http

APPLICATION = "raymuse"


def serve(config: ServeConfig) -> None:
    """Deploy, say where, and wait. Needs Ray.

    Raises:
        UserError: for a model that cannot be opened, a port that is taken, or a public address without a key.
    """
    port = config.port or free_port(config.host)
    key = api_key(config)
    if key is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"listening on {config.host} needs an API key: set api_key_file or RAYMUSE_API_KEY.")
    Pipeline.load(
        config.model, lora=config.adapters
    )  # a broken folder shows here, with its sentence, before anything is deployed
    if not serves_http(config.host, port):
        require_free_port(config.host, port)
        start_http(config.host, port)
    try:
        deploy_api(config, key)
        print(f"serving {config.model}\n  http://{config.host}:{port}/docs", flush=True)
        while True:
            time.sleep(1)
    finally:
        leave_serve(APPLICATION)


def deploy_api(config: ServeConfig, key: str | None) -> None:
    """Run the API and the generator behind it as one Serve application."""
    generator = deployed(config, config.max_queue)
    api = Api.bind(generator, Path(config.model).resolve().name, key)  # type: ignore[attr-defined]
    ray_serve.run(api, name=APPLICATION, route_prefix="/")


def api_key(config: ServeConfig) -> str | None:
    """The key that clients must bring: from a file, else from the environment, else none."""
    if config.api_key_file is None:
        return os.environ.get("RAYMUSE_API_KEY") or None
    path = Path(config.api_key_file)
    if not path.exists():
        raise UserError(f"api_key_file {path} does not exist.")
    key = path.read_text().strip()
    if not key:
        raise UserError(f"api_key_file {path} is empty: an empty key would let everyone in.")
    return key


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
