"""The HTTP API: OpenAI's images calls, with the extensions that masked-image models need."""

import asyncio
import base64
import hmac
import itertools
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from raymuse.drawing.inputs import read_picture
from raymuse.serving.asked import Drawing, DrawRequest, Editing
from raymuse.serving.bodies import read_form, read_json
from raymuse.serving.instance import QUIET
from raymuse.serving.once import Once
from raymuse.serving.protocol import (
    EditRequest,
    GenerationRequest,
    ImagesRequest,
    Refused,
    answer,
    area_of,
    body_of,
    event,
    read_upload,
)
from raymuse.serving.served import Served, blocked, told
from raymuse.serving.watch import Watched, metrics, request_id
from raymuse.storage.pictures import png_bytes
from raymuse.storage.prompts import DenyList
from raymuse.tracking.traces import Trace, Traces

GENERATIONS, EDITS, MODELS = "/v1/images/generations", "/v1/images/edits", "/v1/models"
PLAYGROUND = Path(__file__).with_name("playground.html")
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
PATHS = frozenset({"/", GENERATIONS, EDITS, MODELS, "/health", "/ready", "/metrics"})
KEPT = 256  # pictures that can be fetched by their URL
READY_SECONDS = 5.0
READY_KEPT = 1.0  # seconds that who brings no key is answered what was found last

Authorization = Annotated[str | None, Header()]

app = FastAPI(title="raymuse", description="Text to pictures with a MUSE/aMUSEd masked-image model.")
app.add_middleware(Watched, paths=PATHS)


# What stands above the class is needed by the application when Serve copies it, as it decorates.
@app.exception_handler(Refused)
async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(HTTPException)
async def _no_such(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is")
    return JSONResponse(said.body, said.status)


@app.exception_handler(Exception)
async def _failed(_: Request, error: Exception) -> JSONResponse:
    said = Refused(500, "the server failed at this; its log says why, under the id in X-Request-Id", "server_error")
    return JSONResponse(said.body, said.status)


def _facts(wanted: DrawRequest) -> dict[str, Any]:
    return {"seed": wanted.seed, "prompt": wanted.prompt, "negative_prompt": wanted.negative}


def _wanted(body: ImagesRequest, editing: Editing | None, style: str | None) -> list[DrawRequest]:
    """What the generator is asked for, a picture each."""
    return [
        DrawRequest(
            body.prompt,
            seed,
            body.negative_prompt,
            body.num_inference_steps,
            body.guidance_scale,
            size=body.pixels,
            editing=editing,
            style=style,
            style_scale=round(body.lora_scale, 2),
            sampling=body.sampling,
        )
        for seed in body.seeds(secrets.randbits(62) if body.seed is None else body.seed)
    ]


def _read_pictures(image: bytes, mask: bytes | None) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """The pixels of the picture to edit, and where to draw."""
    picture = read_upload(image, "image")
    area = area_of(picture, None if mask is None else read_upload(mask, "mask"))
    return read_picture(picture), area


def _encoded(wanted: Sequence[DrawRequest], drawn: Sequence[Drawing]) -> list[bytes]:
    """PNG, a picture each."""
    return [png_bytes(drawing.pixels, _facts(one)) for one, drawing in zip(wanted, drawn, strict=True)]


def _inline(pngs: Sequence[bytes], seeds: Sequence[int], size: str) -> Response:
    """The answer with the pictures in it."""
    pictures = [
        {"b64_json": base64.b64encode(png).decode(), "seed": seed} for png, seed in zip(pngs, seeds, strict=True)
    ]
    return JSONResponse(answer(pictures, size))


async def _and_then(first: bytes, events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    """A stream whose first event is known; what goes wrong after it is an event too."""
    async with aclosing(events):
        yield first
        try:
            async for one in events:
                yield one
        except Refused as refused:
            yield _error_event(refused)
        except Exception:
            yield _error_event(Refused(500, "the server failed at this; its log says why", "server_error"))
            raise


def _error_event(refused: Refused) -> bytes:
    return b"event: error\ndata: " + bytes(JSONResponse(refused.body).body) + b"\n\n"


@dataclass(frozen=True)
class ServedAs:
    """What an API is told of one of its models.

    Attributes:
        most: pictures of it that may be on their way at a time.
        styles: names of LoRAs; the model in one of them is `NAME:STYLE`.
    """

    most: int
    styles: tuple[str, ...] = ()


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    graceful_shutdown_wait_loop_s=0.1,
    logging_config=QUIET,
)
@serve.ingress(app)
class Api:
    """The ingress: keys, checks, bounds, seeds, PNG; the generators behind it only draw.

    Args:
        models: by the name that clients call them by; the first is drawn with where a request names none.
        generators: of the same models, in their order.
        keys: of which a client must bring one; none: everyone may come.
        deadline: seconds until a request is answered 504.
        denied: phrases that no prompt may have.
        traces: MLflow server that is told of every request for pictures; None: none is.
    """

    def __init__(
        self,
        models: Mapping[str, ServedAs],
        keys: Sequence[str],
        deadline: float,
        denied: DenyList,
        traces: str | None,
        *generators: DeploymentHandle,
    ) -> None:
        self.served = {
            name: Served(generator, model.most, deadline)
            for (name, model), generator in zip(models.items(), generators, strict=True)
        }
        self.names: dict[str, tuple[str, str | None]] = {}
        for name, model in models.items():
            self.names |= {name: (name, None)} | {f"{name}:{style}": (name, style) for style in model.styles}
        self.keys = [key.encode() for key in keys]
        self.denied = denied
        self.traces = None if traces is None else Traces(traces, metrics().traces_lost.inc)
        self.files: OrderedDict[str, bytes] = OrderedDict()
        self.readiness = Once(READY_KEPT, self._described)

    # --- what is asked

    @app.get("/", include_in_schema=False)
    async def playground(self) -> Response:
        """A page to draw on, of this server alone: it loads nothing from elsewhere."""
        return Response(PLAYGROUND.read_text(), media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        """Whether the API lives."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(self, authorization: Authorization = None) -> dict[str, Any]:
        """Whether a picture of every model could be drawn now; who brings a key is told of each model."""
        if self._may_come(authorization):
            return {"status": "ready", "models": await self._described()}
        await self.readiness()  # of strangers only one a second is passed on
        return {"status": "ready"}

    @app.get("/metrics")
    async def measured(self) -> Response:
        """Prometheus metrics."""
        return Response(metrics().text(), media_type="text/plain; version=0.0.4")

    @app.get(MODELS)
    async def listed(self, authorization: Authorization = None) -> dict[str, Any]:
        """The models that are served, plain and in their styles."""
        self._authorise(authorization)
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "raymuse"} for name in self.names]
        return {"object": "list", "data": data}

    @app.post(GENERATIONS, openapi_extra=body_of(GenerationRequest, "application/json"))
    async def generate(self, request: Request, authorization: Authorization = None) -> Response:
        """Pictures from a prompt."""
        self._authorise(authorization)  # before a byte of the body is read
        return await self._answer(await read_json(request, GenerationRequest), None, request)

    @app.post(EDITS, openapi_extra=body_of(EditRequest, "multipart/form-data"))
    async def edit(self, request: Request, authorization: Authorization = None) -> Response:
        """Pictures from a prompt and a picture: a form of `image`, `mask` if there is one, and EditRequest's fields."""
        self._authorise(authorization)
        body, image, mask = await read_form(request, EditRequest)
        if image is None:
            raise Refused(400, "image: the picture to edit is missing", param="image")
        self._model(body)[0].room.require(body.n)  # before the pictures are decoded
        with told():
            pixels, area = await asyncio.to_thread(_read_pictures, image, mask)
        task = body.task or ("image-to-image" if area is None else "inpaint")
        if task != "inpaint":
            area = None
        left, top, right, bottom = map(int, body.sides.split(","))
        editing = Editing(task, pixels, area, body.strength, (left, top, right, bottom))
        return await self._answer(body, editing, request)

    @app.get("/v1/images/files/{name}.png")
    async def file(self, name: str) -> Response:
        """A picture that was answered by its URL."""
        if name not in self.files:
            raise Refused(404, f"this picture is gone: the last {KEPT} can be fetched")
        return Response(self.files[name], media_type="image/png")

    # --- how it is answered

    async def _answer(self, body: ImagesRequest, editing: Editing | None, request: Request) -> Response:
        trace = Trace(request_id(), f"POST {request.url.path}", body.model_dump(exclude_none=True))
        try:
            model, style = self._model(body)
            self._check(body)
            wanted = _wanted(body, editing, style)
            if body.stream:
                kind = "image_generation" if editing is None else "image_edit"
                events = self._stream(model, wanted[0], body.partial_images, kind, trace)
                rest = _and_then(await anext(events), events)  # what is refused is refused by its status
                return StreamingResponse(rest, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            with trace.span("draw"):
                drawn = await model.draw(wanted)
            with trace.span("encode"):
                answered = await self._told(wanted, drawn, body, request)
            self._send(trace, seeds=[one.seed for one in wanted])
            return answered
        except BaseException as error:
            self._send(trace, error=repr(error))
            raise

    async def _told(
        self, wanted: Sequence[DrawRequest], drawn: Sequence[Drawing], body: ImagesRequest, request: Request
    ) -> Response:
        """The answer; PNG and base64 are made beside the event loop, which goes on answering others."""
        pngs = await asyncio.to_thread(_encoded, wanted, drawn)
        height, width = drawn[0].pixels.shape[:2]
        seeds, size = [one.seed for one in wanted], f"{width}x{height}"
        if body.response_format != "url":
            return await asyncio.to_thread(_inline, pngs, seeds, size)
        root = str(request.base_url).rstrip("/")
        places = [f"{root}/v1/images/files/{self._keep(png)}.png" for png in pngs]
        pictures = [{"url": place, "seed": seed} for place, seed in zip(places, seeds, strict=True)]
        return JSONResponse(answer(pictures, size))

    async def _stream(
        self, model: Served, wanted: DrawRequest, partials: int, kind: str, trace: Trace
    ) -> AsyncGenerator[bytes]:
        """Server-sent events: partial pictures, then the whole one."""
        try:
            async with aclosing(model.stream(wanted, partials)) as pictures:
                for number in itertools.count():
                    with trace.span("draw"):
                        drawn = await anext(pictures)
                    with trace.span("encode"):
                        one = await asyncio.to_thread(self._event, drawn, kind, wanted, number)
                    yield one
                    if isinstance(drawn, Drawing):
                        break
            self._send(trace, seeds=[wanted.seed])
        except BaseException as error:
            self._send(trace, error=repr(error))
            raise

    def _event(self, drawn: NDArray[np.uint8] | Drawing, kind: str, wanted: DrawRequest, number: int) -> bytes:
        if isinstance(drawn, Drawing):
            return event(f"{kind}.completed", drawn.pixels, _facts(wanted), seed=wanted.seed)
        return event(f"{kind}.partial_image", drawn, {}, partial_image_index=number)

    def _send(self, trace: Trace, **outputs: Any) -> None:
        """Hand the trace over, once; another thread sends it."""
        if self.traces is not None and not trace.end:
            self.traces.send(trace.ended(outputs))

    async def _described(self) -> dict[str, dict[str, int]]:
        """Every model, by its name.

        Raises:
            Refused: one does not answer.
        """
        try:
            async with asyncio.timeout(READY_SECONDS):
                said = await asyncio.gather(*(model.describe() for model in self.served.values()))
        except Exception as error:
            raise Refused(503, "a generator does not answer", "server_error", retry_after=5) from error
        return dict(zip(self.served, said, strict=True))

    def _may_come(self, authorization: str | None) -> bool:
        given = (authorization or "").removeprefix("Bearer ").strip().encode()
        fits = [hmac.compare_digest(given, key) for key in self.keys]  # all of them, however soon one fits
        return not self.keys or any(fits)

    def _authorise(self, authorization: str | None) -> None:
        if not self._may_come(authorization):
            raise Refused(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY`",
                "authentication_error",
                code="invalid_api_key",
            )

    def _model(self, body: ImagesRequest) -> tuple[Served, str | None]:
        """The model that a request names, and in which style."""
        name = next(iter(self.served)) if body.model is None else body.model
        if name not in self.names:
            known = ", ".join(repr(name) for name in self.names)
            raise Refused(404, f"model {name!r} is not served here; {known} is", param="model", code="model_not_found")
        model, style = self.names[name]
        return self.served[model], style

    def _check(self, body: ImagesRequest) -> None:
        if body.stream and body.n != 1:
            raise Refused(400, f"n: a stream shows one picture, not {body.n}", param="n")
        if self.denied.found(body.prompt) is not None:
            raise blocked("the prompt has a word or phrase that this server refuses")

    def _keep(self, png: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self.files[name] = png
        while len(self.files) > KEPT:
            self.files.popitem(last=False)
        return name
