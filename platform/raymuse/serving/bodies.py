"""Bodies of requests: bounded while they are read, and checked before anything is done with them."""

from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from raymuse.serving.protocol import ImagesRequest, Refused

MOST_JSON = 256 * 2**10  # bytes: two prompts of 4000 characters, each written as two escapes, take 96 KiB
MOST_FORM = 32 * 2**20
FILES = ("image", "image[]", "mask")

T = TypeVar("T", bound=ImagesRequest)


async def read_json(request: Request, kind: type[T]) -> T:
    """The fields of a JSON body.

    Raises:
        Refused: it is too long, is not declared as JSON (so that no other site's page can send it), or is wrong.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(400, "the body must be JSON: send the header `Content-Type: application/json`")
    content = b"".join([chunk async for chunk in bounded(request, MOST_JSON).stream()])
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise wrong(error.errors()) from None


async def read_form(request: Request, kind: type[T]) -> tuple[T, bytes | None, bytes | None]:
    """The fields of a form, its `image` and its `mask`.

    Raises:
        Refused: it is too long, cannot be read, or is wrong.
    """
    most_fields = len(kind.model_fields) + len(FILES)
    try:
        async with bounded(request, MOST_FORM).form(max_files=len(FILES), max_fields=most_fields) as form:
            fields = _fields(form, kind)
            return fields, await _upload(form, "image"), await _upload(form, "mask")
    except (HTTPException, FormParserError) as error:
        raise Refused(400, f"the form cannot be read: {getattr(error, 'detail', error)}") from error


def bounded(request: Request, most: int) -> Request:
    """The same request; whoever reads more than `most` bytes of its body is stopped.

    Raises:
        Refused: it says that it is longer, or does not say how long it is.
    """
    if "transfer-encoding" in request.headers:
        raise Refused(411, "the body has no Content-Length: send it in one piece")
    length, read = request.headers.get("content-length", ""), 0
    if length.isdigit() and int(length) > most:
        raise _too_long(int(length), most)

    async def receive() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > most:
            raise _too_long(read, most)
        return message

    return Request(request.scope, receive)


def wrong(errors: Sequence[Any]) -> Refused:
    """Every field that is wrong, in one sentence."""
    fields = [".".join(str(part) for part in error["loc"] if part != "body") for error in errors]
    said = "; ".join(
        f"{field}: {error['msg']}" if field else error["msg"] for field, error in zip(fields, errors, strict=True)
    )
    return Refused(400, said, param=fields[0] or None)


def _fields(form: FormData, kind: type[T]) -> T:
    """The fields of a form that are no files."""
    try:
        return kind.model_validate({name: value for name, value in form.items() if name not in FILES})
    except ValidationError as error:
        raise wrong(error.errors()) from None


async def _upload(form: FormData, name: str) -> bytes | None:
    """The one file of a form's field."""
    given = [*form.getlist(name), *form.getlist(f"{name}[]")]
    if not given:
        return None
    if len(given) > 1 or not isinstance(given[0], UploadFile):
        raise Refused(400, f"{name}: send one file", param=name)
    content: bytes = await given[0].read()
    return content


def _too_long(length: int, most: int) -> Refused:
    return Refused(413, f"a body of {length} bytes: {most} are the limit")
