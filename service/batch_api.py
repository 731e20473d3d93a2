"""The routes of batches."""

from typing import Annotated, Any, cast

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service import schemas
from service.api import PROBLEMS, ClientGone, State, Visiting
from service.batches import Batches
from service.items import KINDS

__all__ = ["router"]

SEVERAL = {
    409: {**PROBLEMS[404], "description": "Not what can be done with a batch in its state."},
    404: {**PROBLEMS[404], "description": "There is no such batch, or no such model."},
    507: {**PROBLEMS[404], "description": "No more room for batches."},
}
router = APIRouter(prefix="/v1/batches", responses={**PROBLEMS, **SEVERAL})
BYTES = {"content": {"application/octet-stream": {"schema": {"type": "string"}}}}
FILE = {"requestBody": {"required": True, "description": KINDS, **BYTES}}
DOWNLOAD: dict[int | str, dict[str, Any]] = {
    200: BYTES,
    206: {"description": "The part that Range asks for."},
    307: {"description": "In a bucket; the address holds for an hour."},
}
HOUR = 3600


def _batches(request: Request) -> Batches:
    return cast("Batches", cast("State", request.state)["batches"])


@router.post("", status_code=202, openapi_extra=FILE)
async def submit(
    asked: Annotated[schemas.BatchQuery, Query()],
    visit: Visiting,
    request: Request,
    response: Response,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            description="The same key, file and options are the same batch, sent again or not.",
        ),
    ] = None,
) -> schemas.Batch:
    """Hand in a file of images; the first of them are looked at before it is taken."""
    model = await visit.model(asked.model)
    try:
        batch = await _batches(request).submit(asked, model, request.stream(), key=key)
    except ClientDisconnect as gone:
        raise ClientGone from gone
    except ValidationError as invalid:
        errors = [{**error, "loc": ("query", *error["loc"])} for error in invalid.errors()]
        raise RequestValidationError(errors) from invalid
    response.headers["Location"] = f"/v1/batches/{batch.id}"
    response.headers["Retry-After"] = "1"
    return batch


@router.get("")
async def batches(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> schemas.Batches:
    """List the batches, the latest first."""
    return await _batches(request).list(limit=limit, offset=offset)


@router.get("/{id}")
async def batch(id: str, request: Request) -> schemas.Batch:  # noqa: A002
    """Say how a batch is."""
    return await _batches(request).get(id)


@router.get("/{id}/results", responses=DOWNLOAD, response_class=Response)
async def results(id: str, request: Request) -> Response:  # noqa: A002
    """Give the results of a batch that is done."""
    return await _file(id, request, errors=False)


@router.get("/{id}/errors", responses=DOWNLOAD, response_class=Response)
async def errors(id: str, request: Request) -> Response:  # noqa: A002
    """Give a line for every item that has no result."""
    return await _file(id, request, errors=True)


async def _file(name: str, request: Request, *, errors: bool) -> Response:
    found = await _batches(request).file(name, errors=errors)
    if found.path is None:
        return RedirectResponse(found.address(seconds=HOUR))
    return FileResponse(found.path, media_type=found.media_type, filename=found.name)


@router.post("/{id}/cancel", status_code=202)
async def cancel(id: str, request: Request) -> schemas.Batch:  # noqa: A002
    """Have no more of a batch done; where it has ended, nothing changes."""
    return await _batches(request).cancel(id)


@router.delete("/{id}", status_code=204)
async def delete(id: str, request: Request) -> None:  # noqa: A002
    """Forget a batch that has ended, and its results."""
    await _batches(request).delete(id)
