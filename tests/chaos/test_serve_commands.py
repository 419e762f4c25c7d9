"""The commands that serve, as a person starts and stops them: `raymuse serve` and `mlflow models serve`."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from processes import alive, children_named, wait_until
from raymuse.pipeline import Pipeline
from raymuse.serving.deploy import free_port
from raymuse.tracking.run import open_run, register
from raymuse.tracking.server import Server

PROMPT = "a large green star on a white background"
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    return tiny.write_model(root / "model", encoders, cascade=True)


@contextmanager
def command(log: Path, *words: str, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command of this environment, in a session of its own, ended with the block."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    bin_folder = str(Path(sys.executable).parent)
    outside |= {"PATH": f"{bin_folder}:{outside['PATH']}", **environment}
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=outside, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def picture(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_sigterm_ends_raymuse_serve_when_its_requests_are_done(folder: str, tmp_path: Path) -> None:
    """Also two models of one command, each drawing its own pictures."""
    port = free_port("127.0.0.1")
    address = f"http://127.0.0.1:{port}"
    words = (
        "serve",
        folder,
        f"models.other.model={folder}",
        "models.other.batch_size=2",
        f"port={port}",
        "batch_size=4",
    )
    with command(tmp_path / "log", sys.executable, "-m", "raymuse.cli", *words) as process:
        began = time.monotonic()
        wait_until(lambda: process.poll() is not None or answers(f"{address}/ready"), 240)
        print(f"ready after {time.monotonic() - began:.1f} s")
        assert process.poll() is None, (tmp_path / "log").read_text()
        ours = children_named("ray::")

        def ask(seed: int) -> httpx.Response:
            body = {
                "prompt": PROMPT,
                "seed": seed,
                "num_inference_steps": 200,
                "n": 4,
                "model": ("model", "other")[seed % 2],
            }
            return httpx.post(f"{address}/v1/images/generations", json=body, timeout=120)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, seed) for seed in range(4)]
            wait_until(lambda: all(one["load"] for one in httpx.get(f"{address}/ready").json()["models"].values()), 300)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            answered = [one.result() for one in asked]
        assert [one.status_code for one in answered] == [200] * 4
        assert process.wait(120) == 143
        print(f"ended {time.monotonic() - began:.1f} s after SIGTERM, with 16 pictures on their way")
        wait_until(lambda: not alive(ours), 30)
    for seed, one in enumerate(answered):
        alone = Pipeline.load(folder, batch_size=(4, 2)[seed % 2])([PROMPT], seeds=[seed], steps=200)
        np.testing.assert_array_equal(picture(one.json()["data"][0]["b64_json"]), alone.pixels[0])


def test_mlflow_models_serve_answers_for_a_registered_model(folder: str, tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    with Server.start(tmp_path / "mlflow") as server:
        run = open_run(server.uri, "registry", "export", spool=tmp_path / "spool")
        assert register(run, "drawing", folder, alias="champion") == "1"
        words = ("mlflow", "models", "serve", "-m", "models:/drawing@champion", "--env-manager", "local")
        where = ("--host", "127.0.0.1", "--port", str(port))
        with command(tmp_path / "log", *words, *where, MLFLOW_TRACKING_URI=server.uri) as process:
            began = time.monotonic()
            wait_until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/ping"), 300)
            print(f"answers after {time.monotonic() - began:.1f} s")
            assert process.poll() is None, (tmp_path / "log").read_text()
            table = {"columns": ["prompt", "seed", "steps"], "data": [[PROMPT, 7, 3], ["a circle", 8, 2]]}
            answer = httpx.post(
                f"http://127.0.0.1:{port}/invocations",
                content=json.dumps({"dataframe_split": table}),
                headers={"Content-Type": "application/json"},
                timeout=120,
            )
    assert answer.status_code == 200, answer.text
    drawn = answer.json()["predictions"]
    pipeline = Pipeline.load(folder)
    alone = [pipeline([PROMPT], seeds=[7], steps=3).pixels[0], pipeline(["a circle"], seeds=[8], steps=2).pixels[0]]
    assert [row["seed"] for row in drawn] == [7, 8]
    for row, expected in zip(drawn, alone, strict=True):
        np.testing.assert_array_equal(picture(row["image"]), expected)
