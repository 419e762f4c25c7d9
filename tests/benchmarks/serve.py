"""`make bench-serve`: the API with batches beside the API drawing one by one, under 16 clients at once.

`python tests/benchmarks/serve.py [4|8|16 ...]` times some sizes of batches, and keeps the other rows of the file.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from models import PROMPT, SIZES, write_model
from ray import serve
from report import compare, write

from raymuse.clusters.local import session
from raymuse.config.generate import ServeConfig
from raymuse.serving.deploy import APPLICATION, deploy_api, free_port
from raymuse.serving.instance import start_http

CLIENTS, REQUESTS, HOST = 16, 192, "127.0.0.1"
BATCHES = (4, 8, 16)
PACKAGES = ("torch", "ray", "fastapi")


def main(batches: list[int]) -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        model = write_model(root / "model", **SIZES["demo"])
        with session(num_cpus=4, dashboard=False):
            port = free_port(HOST)
            start_http(HOST, port)
            rows = [
                compare(
                    f"demo's size, {CLIENTS} clients, batch_size {batch}",
                    "one-by-one",
                    rate(model, port, batch_size=batch),
                    rate(model, port, batch_size=1),
                    goal=1.5,
                    unit="pictures/s",
                    packages=PACKAGES,
                )
                for batch in batches
            ]
        write("serve", rows, keep=batches != list(BATCHES))
    finally:
        shutil.rmtree(root)


def rate(model: str, port: int, batch_size: int) -> Callable[[], float]:
    """Deploys the API with batches of a size, and measures how many pictures a second its clients get."""

    def measure() -> float:
        deploy_api(ServeConfig(model=model, port=port, batch_size=batch_size, max_queue=256), [])
        try:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            with ThreadPoolExecutor(CLIENTS) as pool, httpx.Client(timeout=120, limits=limits) as client:
                list(pool.map(lambda seed: draw(client, port, seed), range(CLIENTS)))  # warms up
                began = time.perf_counter()
                list(pool.map(lambda seed: draw(client, port, seed), range(REQUESTS)))
                return REQUESTS / (time.perf_counter() - began)
        finally:
            serve.delete(APPLICATION)

    return measure


def draw(client: httpx.Client, port: int, seed: int) -> None:
    answer = client.post(f"http://{HOST}:{port}/v1/images/generations", json={"prompt": PROMPT, "seed": seed})
    answer.raise_for_status()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or list(BATCHES))
