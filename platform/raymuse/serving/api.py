"""The HTTP API: OpenAI's images calls, with the extensions that masked-image models need."""

import asyncio
import base64
import contextlib
import hmac
import itertools
import math
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from numpy.typing import NDArray
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from raymuse.config.errors import UserError
from raymuse.drawing.inputs import read_picture
from raymuse.serving.generator import Drawing, DrawRequest, Editing
from raymuse.serving.instance import QUIET
from raymuse.serving.protocol import (
    EditRequest,
    GenerationRequest,
    ImagesRequest,
    Refused,
    answer,
    area_of,
    event,
    read_upload,
)
from raymuse.serving.watch import Watched, metrics
from raymuse.storage.pictures import png_bytes

GENERATIONS, EDITS, MODELS = "/v1/images/generations", "/v1/images/edits", "/v1/models"
PLAYGROUND = Path(__file__).with_name("playground.html")
POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
PATHS = frozenset({"/", GENERATIONS, EDITS, MODELS, "/health", "/ready", "/metrics"})
MOST_BYTES = 32 * 2**20  # of a request's body
KEPT = 256  # pictures that can be fetched by their URL
READY_SECONDS = 5.0
AGAIN_SECONDS, TRIES = 0.2, 7

T = TypeVar("T", bound=ImagesRequest)
Authorization = Annotated[str | None, Header()]

app = FastAPI(title="raymuse", description="Text to pictures with a MUSE/aMUSEd masked-image model.")
app.add_middleware(Watched, paths=PATHS, most=MOST_BYTES)


# What stands above the class is needed by the application when Serve copies it, as it decorates.
@app.exception_handler(Refused)
async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


@app.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse((told := _wrong(error.errors())).body, told.status)


@app.exception_handler(HTTPException)
async def _no_such(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    told = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is")
    return JSONResponse(told.body, told.status)


@app.exception_handler(Exception)
async def _failed(_: Request, error: Exception) -> JSONResponse:
    told = Refused(500, "the server failed at this; its log says why, under the id in X-Request-Id", "server_error")
    return JSONResponse(told.body, told.status)


def _wrong(errors: Sequence[Any]) -> Refused:
    """Every field that is wrong, in one sentence."""
    fields = [".".join(str(part) for part in error["loc"] if part != "body") for error in errors]
    said = "; ".join(f"{field}: {error['msg']}" for field, error in zip(fields, errors, strict=True))
    return Refused(400, said, param=fields[0] or None)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with the drawing as what a client is told of it."""
    try:
        yield
    except UserError as error:
        raise Refused(400, str(getattr(error, "cause", error))) from error
    except TimeoutError as error:
        raise Refused(504, "the pictures were not done in time: ask for fewer, or later", "server_error") from error


def _facts(wanted: DrawRequest) -> dict[str, Any]:
    return {"seed": wanted.seed, "prompt": wanted.prompt, "negative_prompt": wanted.negative}


def _read_form(form: FormData, kind: type[T]) -> T:
    """The fields of a form that are no files."""
    given = {name: value for name, value in form.items() if name not in ("image", "image[]", "mask")}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _wrong(error.errors()) from None


async def _upload(form: FormData, name: str) -> bytes | None:
    """The one file of a form's field."""
    given = [*form.getlist(name), *form.getlist(f"{name}[]")]
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], UploadFile):
        raise Refused(400, f"{name}: send one file", param=name)
    content: bytes = await given[0].read()
    return content


def _read_pictures(image: bytes, mask: bytes | None) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """The pixels of the picture to edit, and where to draw."""
    picture = read_upload(image, "image")
    area = area_of(picture, None if mask is None else read_upload(mask, "mask"))
    return read_picture(picture), area


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


@serve.deployment(
    ray_actor_options={"num_cpus": 0.1},
    graceful_shutdown_wait_loop_s=0.1,
    logging_config=QUIET,
)
@serve.ingress(app)
class Api:
    """The ingress: keys, checks, bounds, seeds, PNG; the generator behind it only draws.

    Args:
        model: the name it is served by.
        styles: names of LoRAs; the model in one of them is `MODEL:STYLE`.
        keys: of which a client must bring one; none: everyone may come.
        most: pictures that may be on their way at a time; more are answered 429.
        deadline: seconds until a request is answered 504.
    """

    def __init__(
        self,
        generator: DeploymentHandle,
        model: str,
        styles: Sequence[str],
        keys: Sequence[str],
        most: int,
        deadline: float,
    ) -> None:
        self.generator, self.most, self.deadline = generator, most, deadline
        self.models: dict[str | None, str | None] = {None: None, model: None}
        self.models |= {**{f"{model}:{style}": style for style in styles}}
        self.keys = [key.encode() for key in keys]
        self.on_their_way = 0
        self.took = 1.0
        """Seconds that the last requests took, on a moving average."""
        self.files: OrderedDict[str, bytes] = OrderedDict()

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
    async def ready(self) -> dict[str, Any]:
        """Whether a picture could be drawn now."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                return {"status": "ready", **await self.generator.describe.remote()}
        except Exception as error:
            raise Refused(503, "the generator does not answer", "server_error", retry_after=5) from error

    @app.get("/metrics")
    async def measured(self) -> Response:
        """Prometheus metrics."""
        return Response(metrics().text(), media_type="text/plain; version=0.0.4")

    @app.get(MODELS)
    async def served(self, authorization: Authorization = None) -> dict[str, Any]:
        """The model that is served, plain and in its styles."""
        self._authorise(authorization)
        names = [name for name in self.models if name is not None]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "raymuse"} for name in names]
        return {"object": "list", "data": data}

    @app.post(GENERATIONS)
    async def generate(
        self, body: GenerationRequest, request: Request, authorization: Authorization = None
    ) -> Response:
        """Pictures from a prompt."""
        self._authorise(authorization)
        return await self._answer(body, None, request)

    @app.post(EDITS)
    async def edit(self, request: Request, authorization: Authorization = None) -> Response:
        """Pictures from a prompt and a picture: a form of `image`, `mask` if there is one, and EditRequest's fields."""
        self._authorise(authorization)
        async with request.form() as form:
            body = _read_form(form, EditRequest)
            image, mask = await _upload(form, "image"), await _upload(form, "mask")
        if image is None:
            raise Refused(400, "image: the picture to edit is missing", param="image")
        self._require_room(body.n)
        with _told():
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
        await self._check(body)
        seed = body.seed if body.seed is not None else secrets.randbits(62)
        wanted = [
            DrawRequest(
                body.prompt,
                own,
                body.negative_prompt,
                body.num_inference_steps,
                body.guidance_scale,
                size=body.pixels,
                editing=editing,
                style=self.models[body.model],
                style_scale=round(body.lora_scale, 2),
            )
            for own in body.seeds(seed)
        ]
        if body.stream:
            events = self._stream(
                wanted[0], body.partial_images, "image_generation" if editing is None else "image_edit"
            )
            told = _and_then(await anext(events), events)  # what is refused is refused by its status
            return StreamingResponse(told, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        with self._admitted(len(wanted)):
            drawn = await self._draw(wanted)
        pictures = []
        for one, drawing in zip(wanted, drawn, strict=True):
            png = png_bytes(drawing.pixels, _facts(one))
            if body.response_format == "url":
                where = {"url": f"{str(request.base_url).rstrip('/')}/v1/images/files/{self._keep(png)}.png"}
            else:
                where = {"b64_json": base64.b64encode(png).decode()}
            pictures.append({**where, "seed": one.seed})
        height, width = drawn[0].pixels.shape[:2]
        return JSONResponse(answer(pictures, f"{width}x{height}"))

    async def _draw(self, wanted: Sequence[DrawRequest]) -> list[Drawing]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with _told():
            async with asyncio.timeout(self.deadline):
                tasks = [asyncio.ensure_future(self._drawn(one)) for one in wanted]
                try:
                    drawn = await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()  # those that are done do not mind
        self.took += 0.2 * (loop.time() - began - self.took)
        metrics().pictures.inc(len(drawn))
        return drawn

    async def _drawn(self, wanted: DrawRequest) -> Drawing:
        """One picture; asked for again where its replica died."""
        for attempt in range(TRIES):
            response = self.generator.draw.remote(wanted)
            try:
                drawing: Drawing = await response
                return drawing
            except RayActorError:
                await asyncio.sleep(AGAIN_SECONDS * 2**attempt)
            except BaseException:
                response.cancel()  # nobody waits for it any more
                raise
        raise Refused(500, "one replica after the other died of this request", "server_error")

    async def _stream(self, wanted: DrawRequest, partials: int, kind: str) -> AsyncGenerator[bytes]:
        """Server-sent events: partial pictures, then the whole one."""
        until = asyncio.get_running_loop().time() + self.deadline
        with self._admitted(1), _told():
            async with aclosing(self._drawn_in_steps(wanted, partials)) as stream:
                for number in itertools.count():
                    async with asyncio.timeout_at(until):
                        drawn = await anext(stream)
                    if isinstance(drawn, Drawing):
                        metrics().pictures.inc()
                        yield event(f"{kind}.completed", drawn.pixels, _facts(wanted), seed=wanted.seed)
                        return
                    yield event(f"{kind}.partial_image", drawn, {}, partial_image_index=number)

    async def _drawn_in_steps(self, wanted: DrawRequest, partials: int) -> AsyncGenerator[NDArray[np.uint8] | Drawing]:
        """Partial pictures and the whole one; where the replica dies another one goes on."""
        shown = 0
        for attempt in range(TRIES):
            stream = self.generator.options(stream=True).draw_stream.remote(wanted, partials)
            number = 0
            try:
                async for drawn in stream:
                    if number >= shown:
                        yield drawn
                        shown += 1
                    number += 1
                return
            except RayActorError:
                await asyncio.sleep(AGAIN_SECONDS * 2**attempt)
            except BaseException:
                stream.cancel()
                raise
        raise Refused(500, "one replica after the other died of this request", "server_error")

    @contextlib.contextmanager
    def _admitted(self, pictures: int) -> Iterator[None]:
        """Inside, so many pictures more are on their way.

        Raises:
            Refused: where that is more than may be.
        """
        self._require_room(pictures)
        self.on_their_way += pictures
        metrics().in_flight.set(self.on_their_way)
        try:
            yield
        finally:
            self.on_their_way -= pictures
            metrics().in_flight.set(self.on_their_way)

    def _require_room(self, pictures: int) -> None:
        if pictures > self.most:
            raise Refused(400, f"n: this server draws {self.most} pictures at a time, not {pictures}", param="n")
        if self.on_their_way + pictures > self.most:
            raise Refused(
                429,
                f"{self.on_their_way} pictures are on their way and {self.most} may be: try again",
                "rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=max(1, math.ceil(self.took)),
            )

    def _authorise(self, authorization: str | None) -> None:
        given = (authorization or "").removeprefix("Bearer ").strip().encode()
        fits = [hmac.compare_digest(given, key) for key in self.keys]  # all of them, however soon one fits
        if self.keys and not any(fits):
            raise Refused(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY`",
                "authentication_error",
                code="invalid_api_key",
            )

    async def _check(self, body: ImagesRequest) -> None:
        if body.model not in self.models:
            raise Refused(
                404,
                f"model {body.model!r} is not served here; {', '.join(repr(name) for name in self.models if name)} is",
                param="model",
                code="model_not_found",
            )
        if body.stream and body.n != 1:
            raise Refused(400, f"n: a stream shows one picture, not {body.n}", param="n")

    def _keep(self, png: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self.files[name] = png
        while len(self.files) > KEPT:
            self.files.popitem(last=False)
        return name
