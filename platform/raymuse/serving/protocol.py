"""What clients send and are told: OpenAI's images shapes, with the extensions that masked-image models need."""

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from raymuse.config.edit import STRENGTH, Task
from raymuse.config.sampling import REQUESTED, Options, given_options, own_or_none, with_options
from raymuse.drawing.inputs import read_mask
from raymuse.drawing.seeds import image_seed
from raymuse.encoding.pictures import FORMATS
from raymuse.storage.pictures import png_bytes

MOST_PICTURES = 16
MOST_PIXELS = 4096 * 4096  # of a picture to edit


class Refused(Exception):  # noqa: N818 - a verdict on the request, not a failure
    """A request that is answered with an error, in OpenAI's form.

    Args:
        status: of HTTP.
        kind: OpenAI's `type`: "invalid_request_error", "authentication_error", "rate_limit_error", "server_error".
        param: the field that is wrong.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}


@with_options(own_or_none, REQUESTED)
class ImagesRequest(BaseModel):
    """What every request for pictures may say."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = Field(None, description="the served model's name, or none")
    n: int = Field(1, ge=1, le=MOST_PICTURES)
    size: str | None = Field(
        None,
        pattern=r"^(auto|\d{1,4}x\d{1,4})$",
        description="WIDTHxHEIGHT in whole cells, `auto`, or none: the model's",
    )
    response_format: Literal["b64_json", "url"] | None = None
    user: str | None = Field(None, description="accepted and not used")
    stream: bool = Field(False, description="server-sent events: partial pictures, then the whole one; n = 1")
    partial_images: int = Field(0, ge=0, le=16, description="how many partial pictures a stream shows")
    negative_prompt: str = Field("", max_length=4000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(None, ge=1, le=256)
    guidance_scale: float | None = Field(None, ge=0, le=100)
    temperature: float | None = Field(None, ge=0, le=1000)
    end_temperature: float | None = Field(None, ge=0, le=1000)
    guidance_from: float = Field(0.0, ge=0, le=1, description="share of the steps from which there is guidance")
    guidance_to: float = Field(1.0, ge=0, le=1, description="and up to which")
    lora_scale: float = Field(1.0, ge=0, le=2, description="how much of the style of a model NAME:STYLE")

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height; None: the model's own."""
        if self.size in (None, "auto"):
            return None
        width, height = str(self.size).split("x")
        return int(width), int(height)

    @property
    def sampling(self) -> Options:
        """Options beside steps and guidance, those that are given."""
        given = given_options(self, REQUESTED)
        if {"guidance_from", "guidance_to"} & self.model_fields_set:
            given["guidance_span"] = (self.guidance_from, self.guidance_to)
        return cast(Options, given)

    def seeds(self, seed: int) -> list[int]:
        """One picture has the seed asked for; more have seeds that follow from it."""
        return [seed, *(image_seed(seed, 0, sample) for sample in range(1, self.n))]


class GenerationRequest(ImagesRequest):
    """`POST /v1/images/generations`."""


class EditRequest(ImagesRequest):
    """The fields of `POST /v1/images/edits`, beside `image` and `mask`."""

    task: Task | None = Field(None, description="none: inpaint where there is a mask, else image-to-image")
    strength: float = Field(STRENGTH, ge=0, le=1, description="image-to-image: 0 keeps the picture, 1 ignores it")
    sides: str = Field("0,0,0,0", pattern=r"^\d{1,4}(,\d{1,4}){3}$", description="outpaint: left,top,right,bottom")


def body_of(kind: type[ImagesRequest], content_type: str) -> dict[str, Any]:
    """What the OpenAPI page says of a request's body, which is read by hand: a key is asked for before."""
    schema = kind.model_json_schema()
    if content_type == "multipart/form-data":
        files = {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
        schema |= {"properties": {**files, **schema["properties"]}, "required": ["image", *schema["required"]]}
    return {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}}


def read_upload(content: bytes, name: str) -> Image.Image:
    """An uploaded picture, which came in the field `name`.

    Raises:
        Refused: for what is no picture, or too large.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > MOST_PIXELS:
            raise Refused(
                400, f"{name}: {picture.width} x {picture.height} pixels are more than 4096 x 4096", param=name
            )
        return ImageOps.exif_transpose(picture)
    except Refused:
        raise
    except Exception as error:  # Pillow's parsers raise what they like
        raise Refused(400, f"{name} cannot be read as a picture: {error}", param=name) from error


def area_of(picture: Image.Image, mask: Image.Image | None) -> NDArray[np.bool_] | None:
    """Where to draw (H, W): what is transparent in the mask, or in the picture where there is none (as OpenAI has it).

    A mask without transparency is white where to draw, as `raymuse edit` has it. None: there is no mask at all.
    """
    said = mask if mask is not None else picture
    if said.has_transparency_data:
        clear: NDArray[np.bool_] = np.asarray(said.convert("RGBA"))[:, :, 3] < 128
        if clear.any():
            return clear
    return None if mask is None else read_mask(mask)


def answer(pictures: Sequence[Mapping[str, Any]], size: str) -> dict[str, Any]:
    """OpenAI's answer; each picture is `{"b64_json": ...}` or `{"url": ...}`, and its seed, which is ours."""
    return {"created": int(time.time()), "data": list(pictures), "size": size, "output_format": "png"}


def event(kind: str, pixels: NDArray[np.uint8], facts: Mapping[str, Any], **more: Any) -> bytes:
    """A server-sent event with a picture, as OpenAI's streams have it."""
    body = {
        "type": kind,
        "b64_json": base64.b64encode(png_bytes(pixels, facts)).decode(),
        "created_at": int(time.time()),
        "size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        "output_format": "png",
        "background": "opaque",
        "quality": "auto",
        **more,
    }
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n".encode()
