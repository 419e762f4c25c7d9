"""The HTTP API: OpenAI's images shape with the extensions that masked-image models need."""

import asyncio
import base64
import hmac
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from raymuse.pipeline import image_seed
from raymuse.serving.generator import Drawing, DrawRequest
from raymuse.serving.instance import QUIET
from raymuse.storage.pictures import png_bytes

MOST_PICTURES = 16
app = FastAPI(title="raymuse", description="Text to pictures with a MUSE/aMUSEd masked-image model.")


class GenerationRequest(BaseModel):
    """`POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_PICTURES)
    size: str | None = Field(None, description="WxH in pixels, `auto`, or None: the model draws one size")
    response_format: Literal["b64_json"] = "b64_json"
    user: str | None = None
    negative_prompt: str = Field("", max_length=4000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(None, ge=1, le=256)
    guidance_scale: float | None = Field(None, ge=0, le=100)


# These stand above the class: Serve copies the application as it decorates, with the names that exist by then.
def _seeds(request: GenerationRequest, seed: int) -> list[int]:
    """One picture has the seed asked for; more have seeds that follow from it."""
    return [seed, *(image_seed(seed, 0, sample) for sample in range(1, request.n))]


def _facts(request: GenerationRequest, seed: int) -> dict[str, Any]:
    return {"seed": seed, **request.model_dump(include={"prompt", "negative_prompt"})}


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=256,
    graceful_shutdown_wait_loop_s=0.1,
    logging_config=QUIET,
)
@serve.ingress(app)
class Api:
    """The ingress: checks, keys, seeds, PNG; the generator behind it only draws."""

    def __init__(self, generator: DeploymentHandle, model: str, key: str | None) -> None:
        self.generator = generator
        self.model = model
        self.key = key
        self.size: int | None = None

    def _authorise(self, authorization: str | None) -> None:
        given = (authorization or "").removeprefix("Bearer ").strip()
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise HTTPException(401, "a valid API key is needed: send the header `Authorization: Bearer KEY`")

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(self, authorization: Annotated[str | None, Header()] = None) -> dict[str, Any]:
        self._authorise(authorization)
        return {"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": "raymuse"}]}

    @app.post("/v1/images/generations")
    async def generate(
        self, request: GenerationRequest, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        self._authorise(authorization)
        await self._check(request)
        seed = request.seed if request.seed is not None else secrets.randbits(62)
        drawings = await self._draw(request, seed)
        seeds = _seeds(request, seed)
        data = [
            {"b64_json": base64.b64encode(png_bytes(drawing.pixels, _facts(request, own))).decode(), "seed": own}
            for drawing, own in zip(drawings, seeds, strict=True)
        ]
        return {"created": int(time.time()), "data": data}

    async def _check(self, request: GenerationRequest) -> None:
        if request.model not in (None, self.model):
            raise HTTPException(404, f"model {request.model!r} is not served here; {self.model!r} is")
        if self.size is None:
            self.size = (await self.generator.describe.remote())["size"]
        if request.size not in (None, "auto", f"{self.size}x{self.size}"):
            raise HTTPException(400, f"size {request.size!r} cannot be drawn; this model draws {self.size}x{self.size}")

    async def _draw(self, request: GenerationRequest, seed: int) -> list[Drawing]:
        wanted = [
            DrawRequest(
                request.prompt, own, request.negative_prompt, request.num_inference_steps, request.guidance_scale
            )
            for own in _seeds(request, seed)
        ]
        try:
            return list(await asyncio.gather(*(self.generator.draw.remote(one) for one in wanted)))
        except BackPressureError as error:
            raise HTTPException(429, "too many requests wait; try again", headers={"Retry-After": "1"}) from error
