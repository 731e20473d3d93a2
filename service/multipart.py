"""Forms with files, as another way to write the same requests.

A multipart body is turned into the JSON that it stands for before the route sees it, so that both
are validated by the same types and fail with the same problems: each `image` with its `mask` and
`truth` becomes an item of `images`, every other field keeps its name.
"""

import base64
import json
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from service.errors import BadInput, BadRequest

__all__ = ["Handler", "MultipartRoute"]

PICTURES = ("image", "mask", "truth")
INTEGERS = ("draws", "particles", "seed")


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class MultipartRoute(APIRoute):
    """A route that takes its JSON body as a form too."""

    def get_route_handler(self) -> Handler:
        """The handler, behind the translation of forms."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            kind = request.headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "multipart/form-data":
                return await handle(request)
            return await handle(_as_json(request, await _fields(request)))

        return translated


async def _fields(request: Request) -> dict[str, Any]:
    try:
        async with request.form(max_files=1024, max_fields=64) as form:
            return await _request(form)
    except HTTPException as error:
        if error.status_code != HTTPStatus.BAD_REQUEST:
            raise
        raise BadRequest(f"Expected a multipart form; got {error.detail}.") from error


async def _request(form: FormData) -> dict[str, Any]:
    pictures = {name: [await _picture(name, v) for v in form.getlist(name)] for name in PICTURES}
    if not pictures["image"]:
        raise BadInput.of("image", "a file", "nothing")
    fields: dict[str, Any] = {"images": _items(pictures)}
    for name, value in form.multi_items():
        if name in PICTURES:
            continue
        if not isinstance(value, str):
            raise BadInput.of(name, "text", "a file")
        read = _value(name, value)
        if isinstance(read, list):  # a list may come in parts
            fields.setdefault(name, []).extend(read)
        elif name in fields:
            raise BadInput.of(name, "one value", "several")
        else:
            fields[name] = read
    return fields


def _items(pictures: dict[str, list[str]]) -> list[dict[str, str]]:
    count = len(pictures["image"])
    for name, values in pictures.items():
        if len(values) not in (0, count):
            raise BadInput.of(name, f"none or as many as images, {count}", str(len(values)))
    present = [name for name in PICTURES if pictures[name]]
    return [{name: pictures[name][index] for name in present} for index in range(count)]


async def _picture(name: str, value: UploadFile | str) -> str:
    if isinstance(value, str):
        raise BadInput.of(name, "a file", f"the text {value[:40]!r}")
    return base64.b64encode(await value.read()).decode()


def _value(name: str, text: str) -> Any:
    if name == "outputs":
        return [part.strip() for part in text.split(",")]
    try:
        if name == "levels":
            return [float(part) for part in text.split(",")]
        return int(text) if name in INTEGERS else text
    except ValueError as error:
        expected = "numbers with commas between" if name == "levels" else "an integer"
        raise BadInput.of(name, expected, repr(text[:40])) from error


def _as_json(request: Request, fields: dict[str, Any]) -> Request:
    """The same request with a JSON body; what comes after the body is the client's."""
    body: list[Message] = [{"type": "http.request", "body": json.dumps(fields).encode()}]

    async def receive() -> Message:
        return body.pop() if body else await request.receive()

    headers = [(k, v) for k, v in Headers(scope=request.scope).raw if k != b"content-type"]
    scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
    return Request(scope, receive)
