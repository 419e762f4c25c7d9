"""The API under many clients: nothing is lost or wrong, what is too much is sent away, a dead replica costs nothing."""

import base64
import hashlib
import io
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from ray import serve

from processes import children_named
from raymuse.config.generate import ServeConfig
from raymuse.pipeline import Pipeline
from raymuse.serving.deploy import APPLICATION, deploy_api

PROMPT, SEEDS = "a large green star on a white background", 50
MANY = 128  # steps: drawing is then what takes the time, and not the request around it
pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def right(model: str) -> dict[int, str]:
    return draw(model, None)


def draw(model: str, steps: int | None) -> dict[int, str]:
    """What is drawn for each seed."""
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    drawn = Pipeline.load(model, batch_size=16)([PROMPT] * SEEDS, seeds=range(SEEDS), **options)
    return {seed: hashlib.sha256(pixels.tobytes()).hexdigest() for seed, pixels in enumerate(drawn.pixels)}


@pytest.fixture(scope="module")
def address(model: str, http_port: int) -> Iterator[str]:
    deploy_api(ServeConfig(model=model, port=http_port, batch_size=16, max_queue=64), [])
    yield f"http://127.0.0.1:{http_port}"
    serve.delete(APPLICATION)


class Clients:
    """So many at once. Answers are (status, seconds, whether the picture is right)."""

    def __init__(self, address: str, count: int, right: dict[int, str], steps: int | None = None) -> None:
        self.address, self.count, self.right, self.steps = address, count, right, steps

    def ask(self, requests: int, rate: float | None = None) -> list[tuple[int, float, bool]]:
        """Every client asks again when it is answered; or with a `rate` so many ask a second, whatever is answered."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        with ThreadPoolExecutor(self.count) as pool, httpx.Client(timeout=120, limits=limits) as client:
            asked = []
            began = time.perf_counter()
            for number in range(requests):
                if rate is not None:
                    time.sleep(max(0.0, began + number / rate - time.perf_counter()))
                asked.append(pool.submit(self._ask, client, number % SEEDS))
            return [one.result() for one in asked]

    def _ask(self, client: httpx.Client, seed: int) -> tuple[int, float, bool]:
        began = time.perf_counter()
        body: dict[str, Any] = {"prompt": PROMPT, "seed": seed, "num_inference_steps": self.steps}
        answer = client.post(f"{self.address}/v1/images/generations", json=body)
        seconds = time.perf_counter() - began
        if answer.status_code != 200:
            return answer.status_code, seconds, True
        picture = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
        return 200, seconds, hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() == self.right[seed]


def replicas() -> list[psutil.Process]:
    return children_named("ServeReplica:raymuse:Generator")


def test_ten_thousand_requests_of_64_clients(address: str, right: dict[int, str]) -> None:
    clients = Clients(address, 64, right)
    clients.ask(500)
    (replica,) = replicas()
    before = replica.memory_info().rss
    answers = clients.ask(10_000)
    seconds = sorted(answer[1] for answer in answers)
    grown = (replica.memory_info().rss - before) / 2**20
    print(f"p50 {seconds[5000]:.3f} s, p99 {seconds[9900]:.3f} s; memory {before / 2**20:.0f} MiB {grown:+.0f}")
    assert {answer[0] for answer in answers} == {200}
    assert all(answer[2] for answer in answers)
    assert grown < 50


def test_of_four_times_what_it_can_draw_the_rest_is_sent_away_at_once(address: str, model: str) -> None:
    right = draw(model, MANY)
    began = time.perf_counter()
    alone = sorted(answer[1] for answer in Clients(address, 64, right, MANY).ask(1000))
    capacity = 1000 / (time.perf_counter() - began)
    answers = Clients(address, 320, right, MANY).ask(4000, rate=4 * capacity)
    drawn = sorted(answer[1] for answer in answers if answer[0] == 200)
    refused = [answer[1] for answer in answers if answer[0] == 429]
    p99, before = drawn[int(0.99 * len(drawn))], alone[int(0.99 * len(alone))]
    print(
        f"{capacity:.1f} pictures/s; {len(drawn)} drawn, p99 {p99:.3f} s ({before:.3f} s before); {len(refused)} "
        f"refused in {statistics.median(refused):.3f} s (median)"
    )
    assert {answer[0] for answer in answers} == {200, 429}
    assert all(answer[2] for answer in answers)
    assert p99 < 2 * before
    assert statistics.median(refused) < 0.05


def test_a_replica_killed_every_20_seconds_loses_no_request(model: str, http_port: int, right: dict[int, str]) -> None:
    deploy_api(ServeConfig(model=model, port=http_port, batch_size=16, max_queue=64, replicas=2), [])
    stop, killed = threading.Event(), []

    def kill() -> None:
        while not stop.wait(20):
            victim = random.choice(replicas())
            killed.append(victim.pid)
            victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    answers: list[tuple[int, float, bool]] = []
    until = time.monotonic() + 130
    while time.monotonic() < until:
        answers += Clients(f"http://127.0.0.1:{http_port}", 16, right).ask(200)
    stop.set()
    killer.join()
    print(f"{len(answers)} requests, {len(killed)} replicas killed")
    assert len(killed) >= 5
    assert {answer[0] for answer in answers} == {200}
    assert all(answer[2] for answer in answers)
