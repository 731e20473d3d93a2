"""The routes: validate by type, hand jobs to the engine, return."""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Annotated, Any, TypedDict, TypeVar, cast
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

from service import codec, schemas
from service.codec import Picture
from service.engine import (
    FEWEST,
    MAX_SEED,
    Card,
    Engine,
    Estimate,
    Imputation,
    Impute,
    Sample,
    Score,
    Scoring,
    image_seed,
)
from service.errors import MEDIA_TYPE, BadInput, NotAcceptable, NotReady, UnknownFormat
from service.multipart import MultipartRoute

__all__ = ["ClientGone", "State", "health", "router"]

T = TypeVar("T")


class State(TypedDict):
    """What lives as long as the application."""

    engine: Engine
    default_model: str
    codecs: ThreadPoolExecutor


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


def _state(request: Request) -> State:
    return cast("State", request.state)


async def _json_body(request: Request) -> None:
    """Refuses a body of another type, which would fail with a sentence about its bytes."""
    kind = request.headers.get("content-type", "nothing")
    if not JSON_TYPE.match(kind) and await request.body():
        raise UnknownFormat.of("content-type", "application/json", kind[:80])


JSON_TYPE = re.compile(r"\s*application/([\w.-]+\+)?json\s*(;|$)", re.IGNORECASE)
Here = Annotated[State, Depends(_state)]

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
    }
    for status, description in {
        400: "The body is not what it says it is.",
        404: "There is no such model.",
        413: "More bytes or work than one request may bring.",
        405: "Not a method of this address; see Allow.",
        415: "Not a body, image or array that can be read.",
        422: "A field with a value that it cannot have.",
        429: "The queue is full; see Retry-After.",
        500: "A fault of ours.",
        503: "Starting or shutting down.",
    }.items()
}
PICTURE = {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}


def _form(*files: str, **fields: str) -> dict[str, Any]:
    """The multipart form beside a JSON body, in the API's description."""
    properties = {name: {"type": "string", "format": "binary"} for name in files}
    properties |= {name: {"type": kind} for name, kind in fields.items()}
    schema = {"type": "object", "required": ["image"], "properties": properties}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


router = APIRouter(prefix="/v1", responses=PROBLEMS)
forms = APIRouter(route_class=MultipartRoute, dependencies=[Depends(_json_body)])
health = APIRouter()


@forms.post(
    "/impute",
    response_model=schemas.ImputeResponse,
    responses={
        200: PICTURE,
        406: {**PROBLEMS[404], "description": "Several images, one picture."},
    },
    openapi_extra=_form(
        "image",
        "mask",
        model="string",
        draws="integer",
        particles="integer",
        quality="string",
        seed="integer",
        outputs="string",
        levels="string",
        encoding="string",
    ),
)
async def impute(
    body: schemas.ImputeRequest,
    request: Request,
    here: Here,
    accept: Annotated[str, Header(include_in_schema=False)] = "application/json",
) -> Any:
    """Complete images: posterior mean, standard deviation and independent draws.

    With `Accept: image/png` the answer is the one completed picture: the mean, or the draw or the
    median when that alone is in `outputs`.
    """
    name, card = await _model(here, body.model)
    seed = _seed(body.seed)
    as_picture = "image/png" in accept and "application/json" not in accept
    if as_picture and len(body.images) != 1:
        raise NotAcceptable.of("images", "one image for image/png", str(len(body.images)))
    pictures = await _read(here, [(i.image, i.mask, None) for i in body.images], card)
    jobs = [
        Impute(
            model=name,
            values=picture.values,
            missing=picture.missing,
            particles=body.particles,
            draws=max(body.draws, int(as_picture)),
            levels=_levels(body),
            seed=image_seed(seed, index),
            **_quality(body.quality),
        )
        for index, (picture, _) in enumerate(pictures)
    ]
    done: list[Imputation] = await _while_connected(request, here["engine"].submit(jobs))
    work = _picture if as_picture else _imputed
    return await _in_pool(here, work, body, (name, card), seed, [p for p, _ in pictures], done)


@forms.post(
    "/log-likelihood",
    openapi_extra=_form(
        "image",
        "mask",
        "truth",
        model="string",
        particles="integer",
        quality="string",
        estimator="string",
        seed="integer",
    ),
)
async def log_likelihood(
    body: schemas.LogLikelihoodRequest, request: Request, here: Here
) -> schemas.LogLikelihoodResponse:
    """Estimate log p of the observed pixels and, given the truth, of the missing ones."""
    if body.estimator is not None:
        _refuse_estimator(body.estimator, body.quality, body.particles)
    name, card = await _model(here, body.model)
    seed = _seed(body.seed)
    pictures = await _read(here, [(i.image, i.mask, i.truth) for i in body.images], card)
    jobs = [
        Score(
            model=name,
            values=picture.values,
            missing=picture.missing,
            truth=None if truth is None else truth.values,
            particles=body.particles,
            estimator=body.estimator,
            seed=image_seed(seed, index),
            **_quality("standard" if body.estimator else body.quality),
        )
        for index, (picture, truth) in enumerate(pictures)
    ]
    done: list[Scoring] = await _while_connected(request, here["engine"].submit(jobs))
    results = [
        schemas.Scored(
            id=item.id,
            log_likelihood=_estimate(scoring.log_likelihood),
            conditional=scoring.conditional and _estimate(scoring.conditional),
            difference=scoring.difference and _estimate(scoring.difference),
            quality=scoring.quality,
            seed=job.seed,
            binarised=_binarised(picture, card),
        )
        for item, job, (picture, _), scoring in zip(body.images, jobs, pictures, done, strict=True)
    ]
    return schemas.LogLikelihoodResponse(model=name, results=results)


@router.post("/samples", dependencies=[Depends(_json_body)])
async def samples(
    body: schemas.SamplesRequest, request: Request, here: Here
) -> schemas.SamplesResponse:
    """Draw images from the model itself."""
    name, _ = await _model(here, body.model)
    seed = _seed(body.seed)
    job = Sample(model=name, count=body.count, seed=seed)
    (drawn,) = await _while_connected(request, here["engine"].submit([job]))
    encoded = await _in_pool(here, lambda: [codec.encode(i, body.encoding) for i in drawn])
    return schemas.SamplesResponse(model=name, samples=encoded, seed=seed)


@router.get("/models")
async def models(here: Here) -> schemas.Models:
    """List the models."""
    summaries = [
        schemas.ModelSummary(
            name=name,
            default=name == here["default_model"],
            image_shape=card.architecture.image_shape,
            likelihood=card.architecture.likelihood,
            objective=card.objective,
            missing=card.missing,
            weights_sha256=card.weights_sha256,
        )
        for name, card in (await asyncio.to_thread(here["engine"].cards)).items()
    ]
    return schemas.Models(models=summaries)


@router.get("/models/{name}")
async def model(name: str, here: Here) -> dict[str, Any]:
    """Show all that is known about a model: its card."""
    _, card = await _model(here, name)
    return asdict(card)


@health.get("/health/live")
async def live() -> schemas.Health:
    """Say that the process answers."""
    return schemas.Health(status="ok")


@health.get("/health/ready", responses={503: PROBLEMS[503]})
async def ready(here: Here) -> schemas.Health:
    """Say that the models are loaded and the engine does its work."""
    if not here["engine"].ready:
        raise NotReady("The engine is starting, shutting down or stuck.")
    return schemas.Health(status="ok")


@health.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("docs")


router.include_router(forms)


async def _model(here: State, name: str | None) -> tuple[str, Card]:
    """The model that is meant and its card, away from the event loop: it may have to be read."""
    chosen = here["default_model"] if name is None else name
    return chosen, await asyncio.to_thread(here["engine"].card, chosen)


def _quality(asked: schemas.Quality) -> dict[str, Any]:
    """What a job is told of the quality that was asked for."""
    auto = asked == "auto"
    return {"quality": "standard" if auto else asked, "escalates": auto}


def _refuse_estimator(estimator: str, quality: str, particles: int) -> None:
    if quality != "auto":
        raise BadInput.of("estimator", f"none with the quality {quality}", estimator)
    if particles < (fewest := FEWEST.get(estimator, 1)):
        raise BadInput.of("particles", f"at least {fewest} with {estimator}", str(particles))


def _levels(body: schemas.ImputeRequest) -> tuple[float, ...]:
    """Those that the outputs need; the median is the last."""
    levels = body.levels if "quantiles" in body.outputs else []
    return (*levels, *([0.5] if "median" in body.outputs else []))


def _seed(given: int | None) -> int:
    return secrets.randbelow(MAX_SEED + 1) if given is None else given


async def _read(
    here: State, items: list[tuple[Any, Any, Any]], card: Card
) -> list[tuple[Picture, Picture | None]]:
    """The pictures with their holes, and the truths where they were sent."""
    shape = card.architecture.image_shape

    def read() -> list[tuple[Picture, Picture | None]]:
        pictures: list[tuple[Picture, Picture | None]] = []
        for index, (image, mask, truth) in enumerate(items):
            field = f"images[{index}]"
            picture = codec.read_picture(
                image, mask, shape, field=f"{field}.image", mask_field=f"{field}.mask"
            )
            known = None if truth is None else _truth(truth, f"{field}.truth", shape)
            pictures.append((picture, known))
        return pictures

    return await _in_pool(here, read)


def _truth(encoded: Any, field: str, shape: codec.Shape) -> Picture:
    truth = codec.read_picture(encoded, None, shape, field=field)
    if truth.missing.any():
        raise BadInput.of(field, "a complete image", f"{int(truth.missing.sum())} missing pixels")
    return truth


def _imputed(
    body: schemas.ImputeRequest,
    of: tuple[str, Card],
    seed: int,
    pictures: list[Picture],
    done: list[Imputation],
) -> Response:
    name, card = of
    results = [
        schemas.Imputed(
            id=item.id,
            mean=_output("mean", body, lambda p=p, d=d: p.completed(d.mean)),
            draws=_outputs("draws", body, p, d.draws),
            std=_output("std", body, lambda d=d: d.std),
            median=_output("median", body, lambda p=p, d=d: p.completed(d.quantiles[-1])),
            quantiles=_outputs("quantiles", body, p, d.quantiles[: len(body.levels)]),
            log_likelihood=_estimate(d.log_likelihood),
            quality=d.quality,
            seed=image_seed(seed, index),
            binarised=_binarised(p, card),
        )
        for index, (item, p, d) in enumerate(zip(body.images, pictures, done, strict=True))
    ]
    return JSONResponse(schemas.ImputeResponse(model=name, results=results).model_dump())


def _picture(
    body: schemas.ImputeRequest,
    of: tuple[str, Card],
    seed: int,
    pictures: list[Picture],
    done: list[Imputation],
) -> Response:
    ((picture,), (imputation,)) = pictures, done
    chosen = imputation.draws[0] if body.outputs == ["draws"] else imputation.mean
    if body.outputs == ["median"]:
        chosen = imputation.quantiles[-1]
    headers = {
        "X-Seed": str(seed),
        "X-Model": quote(of[0]),
        "X-Log-Likelihood": f"{imputation.log_likelihood.value:.4f}",
        "X-Standard-Error": f"{imputation.log_likelihood.standard_error:.4f}",
        "X-Quality": imputation.quality,
    }
    return Response(
        codec.to_png(picture.completed(chosen)), media_type="image/png", headers=headers
    )


def _output(name: str, body: schemas.ImputeRequest, pixels: Callable[[], Any]) -> Any:
    return codec.encode(pixels(), body.encoding) if name in body.outputs else None


def _outputs(
    name: str, body: schemas.ImputeRequest, picture: Picture, pixels: Iterable[np.ndarray]
) -> list[Any] | None:
    if name not in body.outputs:
        return None
    return [codec.encode(picture.completed(each), body.encoding) for each in pixels]


def _estimate(estimate: Estimate) -> schemas.Estimate:
    return schemas.Estimate(**asdict(estimate))


def _binarised(picture: Picture, card: Card) -> bool:
    if card.binarise == "none":
        return False
    seen = picture.values[:, ~picture.missing]
    return bool(((seen != 0) & (seen != 1)).any())


async def _in_pool(here: State, work: Callable[..., T], *arguments: Any) -> T:
    """Reading and writing pictures away from the event loop."""
    return await asyncio.get_running_loop().run_in_executor(here["codecs"], work, *arguments)


async def _while_connected(request: Request, answer: Awaitable[T]) -> T:
    """The answer, unless the client leaves first: then the work is dropped.

    Nothing else does this: a handler goes on when its client has gone.
    """
    work = asyncio.ensure_future(answer)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return await work
    finally:
        work.cancel()
        left.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
