"""The HTTP API as an OpenAI client sees it, beside batch jobs on the same Serve."""

import asyncio
import base64
import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import Request
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image
from ray import serve

import tiny
from browser import Browser
from processes import wait_until
from raymuse.config.describe import describe
from raymuse.config.errors import UserError
from raymuse.config.generate import GenerateConfig, ServeConfig, models_of
from raymuse.config.load import from_values, load
from raymuse.pipeline import Pipeline, image_seed
from raymuse.serving.bodies import bounded
from raymuse.serving.checker import open_checker
from raymuse.serving.deploy import APPLICATION, api_keys, deploy_api, require_free_port
from raymuse.serving.deploy import serve as serve_forever
from raymuse.serving.instance import join_serve, serves_http
from raymuse.serving.protocol import Refused
from raymuse.stages.generate import generate
from raymuse.storage.pictures import png_facts
from raymuse.tracking.run import Run
from raymuse.tracking.server import Server

KEY, OTHER_KEY = "a key that no log may show", "another one"
PROMPT = "a large green star on a white background"
WEB = httpx.Client(timeout=300)  # one for all: each of its own would read the certificates of the world anew


@pytest.fixture(scope="module")
def ink(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LoRA of the model."""
    return tiny.write_adapter(tmp_path_factory.mktemp("ink") / "ink", model)


@pytest.fixture(scope="module")
def address(model: str, base_model: str, ink: str, http_port: int) -> Iterator[str]:
    """The API with keys, a style and a second model, on loopback."""
    config = ServeConfig(
        model=model,
        models={"small": {"model": base_model, "batch_size": 2, "max_queue": 2, "max_replicas": 2}},
        port=http_port,
        batch_size=4,
        max_queue=16,
        styles={"ink": ink, "gone": "/nowhere"},
        most_styles=1,
    )
    deploy_api(config, [OTHER_KEY, KEY])
    yield f"http://127.0.0.1:{http_port}"
    serve.delete(APPLICATION)


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=300)


def pixels(b64: str | None) -> NDArray[np.uint8]:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def draw(client: openai.OpenAI, **options: object) -> list[NDArray[np.uint8]]:
    answer = client.images.generate(model="model", prompt=PROMPT, **options)  # type: ignore[call-overload]
    return [pixels(one.b64_json) for one in answer.data]


def post(address: str, key: str | None = KEY, **body: object) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return WEB.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, **body}, headers=headers)


# --- pictures


def test_the_openai_client_draws(client: openai.OpenAI) -> None:
    (picture,) = draw(client, size="64x64", response_format="b64_json")
    assert picture.shape == (64, 64, 3)
    assert [one.id for one in client.models.list()] == ["model", "model:ink", "model:gone", "small"]


def test_a_seed_repeats_the_picture_that_the_pipeline_draws(client: openai.OpenAI, model: str) -> None:
    first, second = (draw(client, extra_body={"seed": 11})[0] for _ in range(2))
    alone = Pipeline.load(model, batch_size=4)([PROMPT], seeds=[11])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, alone.pixels[0])


def test_several_pictures_differ_and_each_can_be_drawn_again(address: str, client: openai.OpenAI) -> None:
    data = post(address, n=3, seed=4).json()["data"]
    drawn = [pixels(one["b64_json"]) for one in data]
    assert len({picture.tobytes() for picture in drawn}) == 3
    assert data[0]["seed"] == 4
    again = draw(client, extra_body={"seed": data[2]["seed"]})[0]
    np.testing.assert_array_equal(again, drawn[2])


def test_guidance_steps_and_negative_prompt_reach_the_sampler(address: str, model: str) -> None:
    asked = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "blue"}
    asked |= {"top_k": 5, "temperature": 3.0, "masking": "linear", "guidance_to": 0.5}
    data = post(address, **asked).json()["data"][0]
    how: Any = {"top_k": 5, "temperature": 3.0, "masking": "linear", "guidance_span": (0.0, 0.5)}
    alone = Pipeline.load(model, batch_size=4)([PROMPT], seeds=[3], negative="blue", steps=2, guidance=5.0, **how)
    np.testing.assert_array_equal(pixels(data["b64_json"]), alone.pixels[0])
    facts = png_facts(base64.b64decode(data["b64_json"]))
    assert (facts["seed"], facts["prompt"], facts["negative_prompt"]) == (3, PROMPT, "blue")


def test_a_style_is_a_model_of_its_own(client: openai.OpenAI, model: str, ink: str) -> None:
    for scale in (1.0, 0.5):  # of which one is held at a time
        asked: dict[str, Any] = {"extra_body": {"seed": 11, "lora_scale": scale}}
        answer = client.images.generate(model="model:ink", prompt=PROMPT, **asked)
        alone = Pipeline.load(model, batch_size=4, lora={ink: scale})([PROMPT], seeds=[11])
        np.testing.assert_array_equal(pixels(answer.data[0].b64_json), alone.pixels[0])
        plain = Pipeline.load(model, batch_size=4)([PROMPT], seeds=[11])
        np.testing.assert_array_equal(draw(client, extra_body={"seed": 11})[0], plain.pixels[0])
        assert not np.array_equal(alone.ids, plain.ids)


def test_another_model_has_its_own_replicas_and_queue(address: str, client: openai.OpenAI, base_model: str) -> None:
    alone = Pipeline.load(base_model, batch_size=2)([PROMPT], seeds=[11])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, address, seed=1, n=16, num_inference_steps=64)
        second = pool.submit(post, address, seed=2, n=4, num_inference_steps=64)  # the first model takes no more
        answer = client.images.generate(model="small", prompt=PROMPT, extra_body={"seed": 11})
        too_many = post(address, model="small", n=7)
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), alone.pixels[0])
    assert too_many.status_code == 400
    assert "draws 6 pictures at a time" in too_many.json()["error"]["message"]
    assert [one.result().status_code for one in (first, second)] == [200, 200]
    assert set(serve.status().applications[APPLICATION].deployments) == {"Api", "Generator", "Generator-small"}


def test_pictures_of_other_sizes(client: openai.OpenAI, model: str) -> None:
    (picture,) = draw(client, size="64x32", extra_body={"seed": 5})
    alone = Pipeline.load(model, batch_size=4)([PROMPT], seeds=[5], size=(64, 32))
    np.testing.assert_array_equal(picture, alone.pixels[0])


def test_a_picture_by_its_url(client: openai.OpenAI, address: str) -> None:
    answer = client.images.generate(model="model", prompt=PROMPT, response_format="url", extra_body={"seed": 11})
    fetched = WEB.get(answer.data[0].url)  # no key: nobody can guess it
    assert fetched.headers["content-type"] == "image/png"
    same = draw(client, extra_body={"seed": 11})[0]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(fetched.content)).convert("RGB")), same)
    assert WEB.get(f"{address}/v1/images/files/none.png").status_code == 404


def test_a_stream_shows_the_picture_as_it_comes(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"extra_body": {"seed": 11, "num_inference_steps": 6}}
    events = list(client.images.generate(model="model", prompt=PROMPT, stream=True, partial_images=2, **asked))
    assert [one.type for one in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    partial = [pixels(one.b64_json) for one in events]
    grey = [int((picture == 128).all(axis=2).sum()) for picture in partial]
    assert [picture.shape for picture in partial] == [(64, 64, 3)] * 3
    assert 64 * 64 > grey[0] > grey[1] > grey[2]
    np.testing.assert_array_equal(partial[2], draw(client, **asked)[0])


# --- edits


def png(array: NDArray[Any], mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("way", ["mask", "white mask", "transparent picture"])
def test_what_is_transparent_is_drawn_anew(
    way: str, client: openai.OpenAI, picture: NDArray[np.uint8], model: str
) -> None:
    area = np.zeros((64, 64), dtype=bool)
    area[:32] = True
    clear = np.dstack([picture, np.where(area, 0, 255).astype(np.uint8)])
    files: dict[str, Any] = {
        "mask": {"image": png(picture), "mask": png(clear)},
        "white mask": {"image": png(picture), "mask": png(area.astype(np.uint8) * 255)},
        "transparent picture": {"image": png(clear)},
    }[way]
    answer = client.images.edit(model="model", prompt=PROMPT, extra_body={"seed": 3}, **files)
    seen = np.asarray(
        Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.fromarray(clear)).convert("RGB")
    )
    alone = Pipeline.load(model, batch_size=4).edit(
        "inpaint", [PROMPT], [seen if way == "transparent picture" else picture], masks=[area], seeds=[3]
    )
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), alone.pixels[0])


def test_other_tasks_are_extensions(client: openai.OpenAI, picture: NDArray[np.uint8], model: str) -> None:
    pipeline = Pipeline.load(model, batch_size=4)
    for more, said in [
        ({"strength": 0.5}, {"task": "image-to-image", "strength": 0.5}),
        ({"task": "mask-free"}, {"task": "mask-free"}),
    ]:
        asked: dict[str, Any] = {"n": 2, "extra_body": {"seed": 3, **more}}
        answer = client.images.edit(model="model", prompt=PROMPT, image=png(picture), **asked)
        seeds = [3, image_seed(3, 0, 1)]
        alone = pipeline.edit(prompts=[PROMPT] * 2, pictures=[picture] * 2, seeds=seeds, **said)  # type: ignore[arg-type]
        drawn = np.stack([pixels(one.b64_json) for one in answer.data])
        np.testing.assert_array_equal(drawn, alone.pixels)


# --- what is refused


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", "ключ".encode().decode("latin-1")])
def test_without_the_right_key_nothing_is_drawn_or_told(address: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
    answers = [
        WEB.post(f"{address}/v1/images/generations", json={"prompt": PROMPT}, headers=headers),
        WEB.post(f"{address}/v1/images/edits", data={"prompt": PROMPT}, files={"image": b""}, headers=headers),
        WEB.get(f"{address}/v1/models", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [401, 401, 401]
    assert {answer.json()["error"]["code"] for answer in answers} == {"invalid_api_key"}
    assert KEY not in "".join(answer.text for answer in answers)


@pytest.mark.parametrize(
    "body",
    [
        {"content": b"{", "headers": {"content-type": "application/json"}},
        {"content": b"x" * 2**20, "headers": {"content-type": "application/json"}},
        {"content": iter([b"no length"])},
        {"data": {"n": "no number"}, "files": {"image": b"no picture"}},
    ],
    ids=["no JSON", "too long", "no length", "form"],
)
def test_a_key_is_asked_for_before_the_body_is_read(address: str, body: dict[str, Any]) -> None:
    for path in ("generations", "edits"):
        answer = WEB.post(f"{address}/v1/images/{path}", **body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_every_key_of_several_fits(address: str) -> None:
    assert {post(address, key, size="1x1").status_code for key in (KEY, OTHER_KEY)} == {400}


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"model": "dall-e-3"}, 404, "'dall-e-3' is not served here; 'model', 'model:ink', 'model:gone', 'small' is"),
        ({"model": "model:gone"}, 400, "/nowhere"),
        ({"size": "1024x1024"}, 400, "the super-resolution draws at most 64"),
        ({"size": "63x64"}, 400, "63 x 64 pixels: this model draws in cells of 8"),
        ({"sise": "64x64"}, 400, "sise"),
        ({"prompt": ""}, 400, "at least 1 character"),
        ({"n": 17}, 400, "less than or equal to 16"),
        ({"seed": -1}, 400, "greater than or equal to 0"),
        ({"top_p": 1.5}, 400, "less than or equal to 1"),
        ({"guidance_from": 0.8, "guidance_to": 0.2}, 400, "guidance_span 0.8, 0.2: two shares of the steps"),
        ({"order": "critic"}, 400, "this model has no critic/"),
        ({"response_format": "jpeg"}, 400, "b64_json"),
        ({"stream": True, "n": 2}, 400, "a stream shows one picture, not 2"),
        ({"prompt": "x" * 2**25}, 413, "are the limit"),
        ({"prompt": "x" * 2**18}, 413, "262144 are the limit"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_request_is_told_what_is_wrong(address: str, body: dict[str, object], code: int, said: str) -> None:
    answer = post(address, **body)
    assert answer.status_code == code
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]


@pytest.mark.parametrize(
    ("files", "fields", "said"),
    [
        ({}, {}, "image: the picture to edit is missing"),
        ({"image": b"no picture"}, {}, "image cannot be read as a picture"),
        ({"image": "png", "mask": b"GIF89a"}, {}, "mask cannot be read as a picture"),
        ({"image": "png", "mask": "small"}, {}, "they must be of one size"),
        ({"image": "png"}, {"task": "inpaint"}, "inpaint takes one mask"),
        ({"image": "png", "mask": "black"}, {}, "the mask marks nothing"),
        ({"image": "long"}, {}, "a picture of 3200 x 2 pixels"),
        ({"image": "png"}, {"task": "outpaint", "sides": "9999,9999,9999,9999"}, "20062 x 20062 pixels"),
        ({"image": "png"}, {"imagine": "x"}, "imagine"),
        ({"image": "png"}, {"task": "paint"}, "task"),
        ({"image": "png"}, {"sides": "1,2"}, "sides"),
        ({"image": "png"}, {"strength": "2"}, "strength"),
    ],
    ids=str,
)
def test_a_bad_edit_is_told_what_is_wrong(
    files: dict[str, Any], fields: dict[str, str], said: str, address: str, picture: NDArray[np.uint8]
) -> None:
    made = {"png": png(picture), "small": png(np.full((32, 32), 255, np.uint8))}
    made |= {"black": png(np.zeros((64, 64), np.uint8)), "long": png(np.zeros((2, 3200), np.uint8))}
    sent = {
        name: made.get(content, content) if isinstance(content, str) else content for name, content in files.items()
    }
    form = {"prompt": PROMPT, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = WEB.post(f"{address}/v1/images/edits", data=form, files=sent or None, headers=headers)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "sent", "code", "said"),
    [
        ("generations", {"content": b'{"prompt": '}, 400, "Invalid JSON"),
        ("generations", {"content": b"\xff\xfe"}, 400, "Invalid JSON"),
        ("generations", {"data": {"prompt": PROMPT}}, 400, "the body must be JSON"),
        ("generations", {"content": iter([b"{", b"}"])}, 411, "no Content-Length"),
        ("edits", {"files": {"image": b"x" * (2**25 + 1)}}, 413, "33554432 are the limit"),
        ("edits", {"content": b"--x\r\nno part"}, 400, "the form cannot be read"),
        ("edits", {"files": [("image", b"x")] * 9}, 400, "the form cannot be read: Too many files"),
        (
            "edits",
            {"files": [("image", b"x"), ("image[]", b"y")], "data": {"prompt": "a"}},
            400,
            "image: send one file",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, str | int) else "body",
)
def test_a_body_that_is_none_is_refused(address: str, path: str, sent: dict[str, Any], code: int, said: str) -> None:
    kinds = {"generations": "application/json", "edits": "multipart/form-data; boundary=x"}
    headers = {"Authorization": f"Bearer {KEY}", **({"Content-Type": kinds[path]} if "content" in sent else {})}
    answer = WEB.post(f"{address}/v1/images/{path}", headers=headers, **sent)
    assert answer.status_code == code, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_body_is_bounded_while_it_is_read() -> None:
    """A front end other than Serve's might let a body through that is longer than it says."""
    chunks = [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 3

    async def receive() -> Any:
        return chunks.pop()

    request = Request({"type": "http", "method": "POST", "headers": [(b"content-length", b"60")]}, receive)
    with pytest.raises(Refused, match="a body of 120 bytes: 100 are the limit") as refused:
        asyncio.run(bounded(request, 100).body())
    assert (refused.value.status, len(chunks)) == (413, 1)


def test_more_pictures_than_may_wait_are_sent_away_and_the_others_drawn(address: str) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: post(address, seed=seed, n=4, num_inference_steps=12), range(12)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 5  # of the 20 pictures that may be on their way
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_a_stream_is_refused_by_its_status(address: str) -> None:
    for body in ({"size": "63x64"}, {"model": "model:gone"}):
        answer = post(address, stream=True, **body)
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert "raymuse_pictures_in_flight 0.0" in WEB.get(f"{address}/metrics").text


# --- who looks after it


def test_a_request_has_an_id_and_is_counted(address: str) -> None:
    def count() -> float:
        lines = WEB.get(f"{address}/metrics").text.splitlines()
        name = 'raymuse_requests_total{path="/v1/images/generations",status="404"} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = count()
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-1"}
    answer = WEB.post(f"{address}/v1/images/generations", json={"prompt": "a", "model": "x"}, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(WEB.get(f"{address}/health").headers["x-request-id"]) > 20
    assert count() == before + 1
    assert "raymuse_pictures_in_flight 0.0" in WEB.get(f"{address}/metrics").text


def test_nobody_draws_for_a_client_that_has_gone(address: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": PROMPT, "num_inference_steps": 256, "n": 8}

    def drawn() -> str:
        metrics = WEB.get(f"{address}/metrics").text.splitlines()
        return next(line for line in metrics if line.startswith("raymuse_pictures_total"))

    before = drawn()
    with pytest.raises(httpx.ReadTimeout):
        WEB.post(f"{address}/v1/images/generations", json=body, headers=headers, timeout=0.5)
    until = time.monotonic() + 300
    while (left := load_of(address)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == 0
    assert drawn() == before
    assert "raymuse_pictures_in_flight 0.0" in WEB.get(f"{address}/metrics").text


def load_of(address: str, name: str = "model") -> int:
    """Pictures that a model has on its way."""
    told = WEB.get(f"{address}/ready", headers={"Authorization": f"Bearer {KEY}"}).json()
    return int(told["models"][name]["load"])


def test_health_and_documentation_need_no_key(address: str) -> None:
    assert WEB.get(f"{address}/health").json() == {"status": "ok"}
    models = {"model": {"size": 64, "base_size": 32, "load": 0}, "small": {"size": 32, "base_size": 32, "load": 0}}
    for key in ({}, {"Authorization": "Bearer wrong"}):  # strangers learn neither names nor load
        assert WEB.get(f"{address}/ready", headers=key).json() == {"status": "ready"}
    told = WEB.get(f"{address}/ready", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert told == {"status": "ready", "models": models}
    assert WEB.get(f"{address}/nothing").json()["error"]["message"].startswith("GET /nothing: Not Found")
    assert "raymuse" in WEB.get(f"{address}/docs").text
    assert "/v1/images/generations" in WEB.get(f"{address}/openapi.json").json()["paths"]


# --- the page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium: apt-get install chromium")
def test_the_page_draws_inpaints_and_extends(address: str, model: str, tmp_path: Path) -> None:
    other = "a small red circle on a black background"
    with Browser(tmp_path / "home") as page:
        page.open(f"{address}/")
        page.wait_for("document.readyState === 'complete'")
        fill(page, key=KEY, prompt=PROMPT, seed=str(2**62 + 1))
        page.wait_for("document.querySelectorAll('#model option').length === 4")
        page.evaluate("document.getElementById('draw').click()")
        page.wait_for("document.body.dataset.done === '1'")
        fill(page, task="inpaint", prompt=other)
        page.evaluate(PAINT_THE_LEFT_HALF)
        page.screenshot(tmp_path / "page.png")
        page.evaluate("document.getElementById('draw').click()")
        page.wait_for("document.body.dataset.done === '2'")
        note = page.evaluate("document.getElementById('note').textContent")
        fill(page, task="outpaint", side="right")
        page.evaluate("document.getElementById('draw').click()")
        page.wait_for("document.body.dataset.done === '3'")
        wider = page.evaluate("document.getElementById('note').textContent")
        sources = page.evaluate("[...document.querySelectorAll('figure img')].map((image) => image.src)")
    assert (note, wider) == (f"seed {2**62 + 1}, 64x64", f"seed {2**62 + 1}, 96x64")
    drawn = [pixels(source.removeprefix("data:image/png;base64,")) for source in sources]
    pipeline = Pipeline.load(model, batch_size=4)
    first = pipeline([PROMPT], seeds=[2**62 + 1])
    area = np.zeros((64, 64), dtype=bool)
    area[:, :32] = True
    second = pipeline.edit("inpaint", [other], [first.pixels[0]], masks=[area], seeds=[2**62 + 1])
    np.testing.assert_array_equal(drawn[1:], [second.pixels[0], first.pixels[0]])
    # Beyond a side it draws windows of the model's size, half of which is known: a cascade draws nothing larger.
    window = np.hstack([second.pixels[0][:, 32:], np.full((64, 32, 3), 128, np.uint8)])
    third = pipeline.edit("inpaint", [other], [window], masks=[~area], seeds=[2**62 + 1])
    np.testing.assert_array_equal(drawn[0], np.hstack([second.pixels[0], third.pixels[0][:, 32:]]))
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png")))) > 50


PAINT_THE_LEFT_HALF = """(() => {
const mask = document.getElementById("mask"), box = mask.getBoundingClientRect();
for (let x = box.left; x < box.left + 0.42 * box.width; x += 5)
  for (let y = box.top; y < box.bottom; y += 5)
    mask.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, buttons: 1 }));
})()"""


def fill(page: Browser, **fields: str) -> None:
    """Type into fields, as a person would leave them."""
    for name, value in fields.items():
        page.evaluate(
            f"(() => {{ const field = document.getElementById({name!r}); field.value = {value!r};"
            " field.dispatchEvent(new Event('change')); })()"
        )


# --- one Serve for all


def test_a_batch_job_beside_the_api_leaves_it_serving(
    address: str, client: openai.OpenAI, model: str, http_port: int, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n")
    before = draw(client, extra_body={"seed": 1})[0]
    config = GenerateConfig(output=str(tmp_path / "images"), model=model, prompts=str(tmp_path / "p.txt"), batch_size=4)
    generate(config, Run.off())
    assert list(serve.status().applications) == [APPLICATION]
    assert serves_http("127.0.0.1", http_port)
    online = config.model_copy(update={"output": str(tmp_path / "online"), "engine": "online"})
    generate(online, Run.off())  # by the API's own replicas
    tars = [Path(one.output, "parts/part-000000.tar").read_bytes() for one in (config, online)]
    assert tars[0] == tars[1]
    with pytest.raises(UserError, match=r"none that runs on this cluster serves .* with batch_size=8"):
        generate(online.model_copy(update={"output": str(tmp_path / "other"), "batch_size": 8}), Run.off())
    np.testing.assert_array_equal(draw(client, extra_body={"seed": 1})[0], before)


def test_joining_a_serve_that_runs_changes_nothing(address: str, http_port: int) -> None:
    join_serve()
    assert serves_http("127.0.0.1", http_port)
    assert WEB.get(f"{address}/health").status_code == 200


def test_another_port_than_the_clusters_serve_has_is_refused(address: str, http_port: int, model: str) -> None:
    with pytest.raises(UserError, match=rf"already listens on 127\.0\.0\.1:{http_port}.*use host="):
        serve_forever(ServeConfig(model=model, port=http_port + 1))
    assert WEB.get(f"{address}/health").status_code == 200


# --- before anything is deployed


def test_models_are_named_in_words_and_in_a_file(tmp_path: Path) -> None:
    words = [
        "models.b=runs/b/model",
        "models.c.model=/c",
        "models.c.replicas=2",
        "models.c.max_replicas=4",
        "batch_size=4",
    ]
    config = from_values("serve", {"model": "runs/a/model", "name": "a"}, words)
    assert isinstance(config, ServeConfig)
    models = models_of(config)
    assert [(name, one.model, one.replicas, one.batch_size) for name, one in models.items()] == [
        ("a", "runs/a/model", 1, 4),
        ("b", "runs/b/model", 1, 16),
        ("c", "/c", 2, 16),
    ]
    (tmp_path / "serve.yaml").write_text(describe(config))
    assert load(str(tmp_path / "serve.yaml"), stage="serve") == config
    assert config.within("/root").models["b"].model == "/root/runs/b/model"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["models.model=runs/b/model"], "two models are called 'model'"),
        (["name=b", "models.b=runs/b/model"], "name=b is also in models"),
        (["models.a b=runs/b/model"], "a name is made of letters"),
        (["models.b.model=x", "models.b.replica=2"], "models.b.replica: no such key"),
        (["models.b.replicas=3", "models.b.model=x", "models.b.max_replicas=2"], "max_replicas=2 is below replicas=3"),
        (["model=runs/a b"], "'a b' is no name that clients can ask for"),
    ],
    ids=str,
)
def test_models_that_cannot_be_told_apart_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        models_of(from_values("serve", {"model": "runs/a/model"}, words))  # type: ignore[arg-type]


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} on 127\.0\.0\.1 is taken; choose another"):
            require_free_port("127.0.0.1", port)


def test_a_public_address_needs_a_key(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYMUSE_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"listening on 0\.0\.0\.0 needs an API key"):
        serve_forever(ServeConfig(model=model, host="0.0.0.0", port=0))


def test_the_key_comes_from_a_file_or_the_environment(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from the file\n")
    monkeypatch.setenv("RAYMUSE_API_KEY", "from outside")
    assert api_keys(ServeConfig(model=model)) == ["from outside"]
    assert api_keys(ServeConfig(model=model, api_key_file=str(tmp_path / "key"))) == ["from the file"]
    (tmp_path / "key").write_text("one\n\n two \n")
    assert api_keys(ServeConfig(model=model, api_key_file=str(tmp_path / "key"))) == ["one", "two"]
    with pytest.raises(UserError, match="does not exist"):
        api_keys(ServeConfig(model=model, api_key_file=str(tmp_path / "none")))
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        api_keys(ServeConfig(model=model, api_key_file=str(tmp_path / "key")))


def test_a_folder_that_is_no_model_is_refused_before_anything_is_deployed(http_port: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is no model folder"):
        serve_forever(ServeConfig(model=str(tmp_path), port=http_port))


# --- last: it replaces the API


def test_an_update_fails_no_request_and_what_is_begun_is_finished_when_the_application_ends(
    address: str, base_model: str, http_port: int
) -> None:
    stop = threading.Event()

    def ask() -> list[int]:
        codes = []
        while not stop.is_set():
            codes.append(post(address, num_inference_steps=2).status_code)
        return codes

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        deploy_api(ServeConfig(model=base_model, name="model", port=http_port, batch_size=4, max_queue=16), [KEY])
        stop.set()
        codes = [code for one in asking for code in one.result()]
    assert len(codes) > 3
    assert set(codes) == {200}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(post, address, num_inference_steps=200, n=4, seed=seed) for seed in range(4)]
        wait_until(lambda: load_of(address) == 16, 300)
        serve.delete(APPLICATION)
        answers = [one.result() for one in asked]
    assert [one.status_code for one in answers] == [200] * 4
    assert [len(one.json()["data"]) for one in answers] == [4] * 4
    alone = Pipeline.load(base_model, batch_size=4)([PROMPT] * 4, seeds=range(4), steps=200).pixels
    np.testing.assert_array_equal([pixels(one.json()["data"][0]["b64_json"]) for one in answers], alone)


def test_refused_pictures_are_not_answered_and_every_request_has_a_trace(
    address: str, client: openai.OpenAI, base_model: str, http_port: int, tmp_path: Path
) -> None:
    (tmp_path / "deny.txt").write_text("bad star\n")
    drawn = Pipeline.load(base_model, batch_size=4)([PROMPT] * 8, seeds=range(8)).pixels
    checking = tiny.write_checker(tmp_path / "checker", list(drawn))
    check = open_checker(ServeConfig(model=base_model, **checking))
    assert check is not None
    refused = [check(picture) is not None for picture in drawn]
    safe, unsafe = refused.index(False), refused.index(True)
    with Server.start(tmp_path / "mlflow", wait=False) as mlflow:
        config = ServeConfig(
            model=base_model, name="model", port=http_port, batch_size=4, traces=mlflow.uri, **checking
        )
        deploy_api(config.model_copy(update={"deny": str(tmp_path / "deny.txt")}), [KEY])
        mlflow.wait(300)
        np.testing.assert_array_equal(draw(client, extra_body={"seed": safe})[0], drawn[safe])
        for body in ({"seed": unsafe}, {"seed": unsafe, "stream": True}, {"prompt": "a Bad, bad STAR!"}):
            answer = post(address, **body)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("image_generation_user_error", "moderation_blocked")
        asked: dict[str, Any] = {"extra_body": {"seed": safe}}
        events = list(client.images.generate(model="model", prompt=PROMPT, stream=True, partial_images=2, **asked))
        assert [one.type for one in events] == ["image_generation.completed"]  # no part that nobody looked at
        assert "raymuse_pictures_refused_total 2.0" in WEB.get(f"{address}/metrics").text
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine-2"}
        body = {"prompt": PROMPT, "seed": safe}
        assert WEB.post(f"{address}/v1/images/generations", json=body, headers=headers).status_code == 200
        wait_until(lambda: "mine-2" in traces(mlflow.uri), 300)
        said = traces(mlflow.uri)
    assert said["mine-2"] == ("OK", ["POST /v1/images/generations", "draw", "encode"], PROMPT)
    assert sorted(state for state, *_ in said.values()) == ["ERROR"] * 3 + ["OK"] * 3


def traces(uri: str) -> dict[str, tuple[str, list[str], str]]:
    """State, names of the spans, and prompt of every trace that an MLflow server has, by its request's id."""
    client = MlflowClient(uri)
    if (experiment := client.get_experiment_by_name("raymuse-serving")) is None:
        return {}
    found = client.search_traces(locations=[experiment.experiment_id])
    return {
        one.info.tags["request_id"]: (
            one.info.state.value,
            [span.name for span in one.data.spans],
            one.data.spans[0].inputs["prompt"],
        )
        for one in found
        if "request_id" in one.info.tags  # else it is just being written
    }


def test_a_deadline_holds(address: str, model: str, http_port: int) -> None:
    deploy_api(ServeConfig(model=model, port=http_port, batch_size=4, deadline=1), [KEY])
    answer = post(address, n=16, num_inference_steps=256)
    assert answer.status_code == 504
    assert "not done in time" in answer.json()["error"]["message"]
