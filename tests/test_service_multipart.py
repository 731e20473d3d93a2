"""Forms: the JSON request that each stands for."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from service.errors import Problem
from service.multipart import MultipartRoute
from tests.wire import text

A, B, C = b"\x00\xffone", b"two", b"three"


async def _problem(_request: Request, failure: Exception) -> JSONResponse:
    assert isinstance(failure, Problem)
    return JSONResponse(failure.document(), failure.status)


async def _echo(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    assert request.headers["content-type"] == "application/json"
    return body


def _sent(**request: Any) -> httpx.Response:
    """The JSON that a route was given for a request, or the problem."""
    router = APIRouter(route_class=MultipartRoute)
    router.add_api_route("/", _echo, methods=["POST"])
    app = FastAPI(exception_handlers={Problem: _problem})
    app.include_router(router)

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/", **request)

    return asyncio.run(send())


def test_json_passes_untouched():
    """A body that is no form is the route's own affair."""
    assert _sent(json={"images": [{"image": "x"}]}).json() == {"images": [{"image": "x"}]}


@pytest.mark.parametrize(
    ("files", "images"),
    [
        ({"image": A}, [{"image": A}]),
        ({"image": A, "mask": B}, [{"image": A, "mask": B}]),
        ({"image": A, "mask": B, "truth": C}, [{"image": A, "mask": B, "truth": C}]),
        (
            [("image", A), ("mask", B), ("image", C), ("mask", A)],
            [{"image": A, "mask": B}, {"image": C, "mask": A}],
        ),
        (
            [("mask", B), ("mask", A), ("image", A), ("image", C)],
            [{"image": A, "mask": B}, {"image": C, "mask": A}],
        ),
    ],
)
def test_files_are_items(files: Any, images: list[dict[str, bytes]]):
    """The first image goes with the first mask, wherever they stand in the form."""
    expected = [{name: text(data) for name, data in image.items()} for image in images]

    assert _sent(files=files).json() == {"images": expected}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"draws": "3"}, {"draws": 3}),
        ({"particles": "-10", "seed": "0"}, {"particles": -10, "seed": 0}),
        ({"outputs": "mean, std"}, {"outputs": ["mean", "std"]}),
        ({"outputs": "draws"}, {"outputs": ["draws"]}),
        ({"outputs": ["draws", "mean, std"]}, {"outputs": ["draws", "mean", "std"]}),
        ({"levels": ["0.1", "0.9"]}, {"levels": [0.1, 0.9]}),
        ({"model": "a", "encoding": "npy"}, {"model": "a", "encoding": "npy"}),
        ({"unknown": "7"}, {"unknown": "7"}),
    ],
)
def test_fields_have_the_types_of_their_names(fields: dict[str, Any], expected: dict[str, Any]):
    """Numbers are numbers, outputs a list, and everything else is left to the schema."""
    body = _sent(files={"image": A}, data=fields).json()

    assert body == {"images": [{"image": text(A)}], **expected}


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ({"mask": A}, {}, "image"),
        ({"image": (None, "text")}, {}, "image"),
        ({"image": A, "truth": (None, "text")}, {}, "truth"),
        ([("image", A), ("image", B), ("mask", C)], {}, "mask"),
        ({"image": A, "seed": B}, {}, "seed"),
        ({"image": A}, {"seed": "1e3"}, "seed"),
        ({"image": A}, {"seed": ""}, "seed"),
        ({"image": A}, {"seed": "9" * 5000}, "seed"),
        ({"image": A}, {"seed": ["1", "2"]}, "seed"),
    ],
)
def test_a_form_that_stands_for_nothing_is_a_problem(files: Any, data: Any, field: str):
    """The field is named."""
    answer = _sent(files=files, data=data)

    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"--b--"),
        ("multipart/form-data; boundary=b", b"nothing"),
        ("multipart/form-data; boundary=b", b"--b\r\nbad header\r\n\r\n"),
        ("Multipart/Form-Data; boundary=" + "b" * 500, b"x"),
    ],
)
def test_what_is_no_form_is_a_bad_request(kind: str, content: bytes):
    """Whatever is wrong with it."""
    answer = _sent(content=content, headers={"Content-Type": kind})

    assert answer.status_code == 400
    assert "multipart form" in answer.json()["detail"]
