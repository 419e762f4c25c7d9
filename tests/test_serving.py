"""The HTTP API as an OpenAI client sees it, beside batch jobs on the same Serve."""

import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image
from ray import serve

from raymuse.config.errors import UserError
from raymuse.config.generate import GenerateConfig, ServeConfig
from raymuse.pipeline import Pipeline
from raymuse.serving.deploy import APPLICATION, api_key, deploy_api, require_free_port
from raymuse.serving.deploy import serve as serve_forever
from raymuse.serving.instance import join_serve, serves_http
from raymuse.stages.generate import generate
from raymuse.storage.pictures import png_facts
from raymuse.tracking.run import Run

KEY = "a key that no log may show"
PROMPT = "a large green star on a white background"


@pytest.fixture(scope="module")
def address(model: str, http_port: int) -> Iterator[str]:
    """The API with a key, on loopback."""
    deploy_api(ServeConfig(model=model, port=http_port, batch_size=4), KEY)
    yield f"http://127.0.0.1:{http_port}"
    serve.delete(APPLICATION)


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)


def pixels(b64: str | None) -> NDArray[np.uint8]:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB"))


def draw(client: openai.OpenAI, **options: object) -> list[NDArray[np.uint8]]:
    answer = client.images.generate(model="model", prompt=PROMPT, **options)  # type: ignore[call-overload]
    return [pixels(one.b64_json) for one in answer.data]


def post(address: str, key: str | None = KEY, **body: object) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, **body}, headers=headers, timeout=60)


# --- pictures


def test_the_openai_client_draws(client: openai.OpenAI) -> None:
    (picture,) = draw(client, size="64x64", response_format="b64_json")
    assert picture.shape == (64, 64, 3)
    assert [one.id for one in client.models.list()] == ["model"]


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
    data = post(address, **asked).json()["data"][0]
    alone = Pipeline.load(model, batch_size=4)([PROMPT], seeds=[3], negative="blue", steps=2, guidance=5.0)
    np.testing.assert_array_equal(pixels(data["b64_json"]), alone.pixels[0])
    facts = png_facts(base64.b64decode(data["b64_json"]))
    assert (facts["seed"], facts["prompt"], facts["negative_prompt"]) == (3, PROMPT, "blue")


# --- what is refused


@pytest.mark.parametrize("key", [None, "wrong", KEY + "x", "ключ".encode().decode("latin-1")])
def test_without_the_right_key_nothing_is_drawn_or_told(address: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode("latin-1")}
    answer = httpx.post(f"{address}/v1/images/generations", json={"prompt": PROMPT}, headers=headers)
    listed = httpx.get(f"{address}/v1/models", headers=headers)
    assert [answer.status_code, listed.status_code] == [401, 401]
    assert KEY not in answer.text


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({"model": "dall-e-3"}, 404, "'dall-e-3' is not served here; 'model' is"),
        ({"size": "1024x1024"}, 400, "this model draws 64x64"),
        ({"sise": "64x64"}, 422, "sise"),
        ({"prompt": ""}, 422, "at least 1 character"),
        ({"n": 17}, 422, "less than or equal to 16"),
        ({"seed": -1}, 422, "greater than or equal to 0"),
        ({"response_format": "url"}, 422, "b64_json"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(address: str, body: dict[str, object], code: int, said: str) -> None:
    answer = post(address, **body)
    assert answer.status_code == code
    assert said in json.dumps(answer.json(), ensure_ascii=False)


def test_health_and_documentation_need_no_key(address: str) -> None:
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert "raymuse" in httpx.get(f"{address}/docs").text
    assert "/v1/images/generations" in httpx.get(f"{address}/openapi.json").json()["paths"]


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
    np.testing.assert_array_equal(draw(client, extra_body={"seed": 1})[0], before)


def test_joining_a_serve_that_runs_changes_nothing(address: str, http_port: int) -> None:
    join_serve()
    assert serves_http("127.0.0.1", http_port)
    assert httpx.get(f"{address}/health").status_code == 200


def test_another_port_than_the_clusters_serve_has_is_refused(address: str, http_port: int, model: str) -> None:
    with pytest.raises(UserError, match=rf"already listens on 127\.0\.0\.1:{http_port}.*use host="):
        serve_forever(ServeConfig(model=model, port=http_port + 1))
    assert httpx.get(f"{address}/health").status_code == 200


# --- before anything is deployed


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
    assert api_key(ServeConfig(model=model)) == "from outside"
    assert api_key(ServeConfig(model=model, api_key_file=str(tmp_path / "key"))) == "from the file"
    with pytest.raises(UserError, match="does not exist"):
        api_key(ServeConfig(model=model, api_key_file=str(tmp_path / "none")))
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        api_key(ServeConfig(model=model, api_key_file=str(tmp_path / "key")))


def test_a_folder_that_is_no_model_is_refused_before_anything_is_deployed(http_port: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is no model folder"):
        serve_forever(ServeConfig(model=str(tmp_path), port=http_port))
