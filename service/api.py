"""The routes: validate by type, hand jobs to the engine, return."""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Annotated, Any, TypedDict, TypeVar, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute

from service import codec, schemas
from service.batches import Batches
from service.engine import Engine
from service.errors import MEDIA_TYPE, NotAcceptable, NotReady, UnknownFormat
from service.models import Model, Models
from service.multipart import MultipartRoute
from service.operations import Imputing, LogLikelihood, Pictures, a_seed, read, results
from service.work import Imputation, Job, Sample, Scoring

__all__ = ["PROBLEMS", "WORK", "ClientGone", "State", "Visiting", "health", "router"]

T = TypeVar("T")


class State(TypedDict):
    """What lives as long as the application."""

    engine: Engine
    models: Models
    default_model: str
    timeout: float
    """Seconds that a request gets at most."""
    codecs: ThreadPoolExecutor
    batches: Batches | None
    """None where none are taken."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


async def _json_body(request: Request) -> None:
    """Refuses a body of another type, which would fail with a sentence about its bytes."""
    kind = request.headers.get("content-type", "nothing")
    if not JSON_TYPE.match(kind) and await request.body():
        raise UnknownFormat.of("content-type", "application/json", kind[:80])


JSON_TYPE = re.compile(r"\s*application/([\w.-]+\+)?json\s*(;|$)", re.IGNORECASE)
TimeoutMs = Annotated[
    int | None,
    Header(
        alias="X-Timeout-Ms",
        ge=1,
        le=24 * 3600 * 1000,
        description="Milliseconds after which the answer is of no use: then it is 504. "
        "The server has a limit of its own.",
    ),
]


class Clock:
    """What a request's time goes into, for the header Server-Timing."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """The time within belongs to this part."""
        started = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - started

    @property
    def header(self) -> dict[str, str]:
        """The parts so far, in milliseconds."""
        told = (f"{name};dur={1000 * seconds:.1f}" for name, seconds in self.parts.items())
        return {"Server-Timing": ", ".join(told)}


@dataclass(frozen=True)
class Visit:
    """A request on its way: what there is here for it, and what its time goes into."""

    request: Request
    here: State
    until: float
    """When its answer is too late; of time.monotonic()."""
    clock: Clock = field(default_factory=Clock)

    async def model(self, name: str | None) -> Model:
        """The model that is meant; one that has to be read is, away from the event loop."""
        models = self.here["models"]
        chosen = self.here["default_model"] if name is None else name
        return models.at_hand(chosen) or await asyncio.to_thread(models.get, chosen)

    async def coded(
        self, part: str, work: Callable[..., T], *arguments: Any, pictures: int, shape: codec.Shape
    ) -> T:
        """Reading or writing so many pictures: where there is little of it, here and now.

        Otherwise it is done away from the event loop, which takes more time but nobody else's.
        """
        length = int(self.request.headers.get("content-length", LITTLE))
        with self.clock.part(part):
            if length + pictures * math.prod(shape) <= LITTLE:
                return work(*arguments)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.here["codecs"], work, *arguments)

    async def results(self, jobs: Sequence[Job]) -> list[Any]:
        """The jobs' results, unless the client leaves first: then the work is dropped.

        Nothing else does this: a handler goes on when its client has gone.
        """
        seconds = self.until - time.monotonic()
        work = asyncio.ensure_future(self.here["engine"].submit(jobs, seconds=seconds))
        left = asyncio.ensure_future(_disconnected(self.request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            answers = await work
        finally:
            work.cancel()
            left.cancel()
        self.clock.parts |= {"queue": answers.waited, "compute": answers.worked}
        return answers.results


LITTLE = 2**14
"""Bytes that came, and numbers of the pictures."""


async def _visit(request: Request, limit: TimeoutMs = None) -> Visit:
    here = cast("State", request.state)
    asked = math.inf if limit is None else limit / 1000
    return Visit(request, here, time.monotonic() + min(asked, here["timeout"]))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
        504: "The time that the request had has passed.",
    }.items()
}
PICTURE = {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}


def _form(*files: str, **fields: str) -> dict[str, Any]:
    """The multipart form beside a JSON body, in the API's description."""
    properties = {name: {"type": "string", "format": "binary"} for name in files}
    properties |= {name: {"type": kind} for name, kind in fields.items()}
    schema = {"type": "object", "required": ["image"], "properties": properties}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


Visiting = Annotated[Visit, Depends(_visit)]
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
        tolerance="number",
        quality="string",
        seed="integer",
        outputs="string",
        levels="string",
        encoding="string",
    ),
)
async def impute(
    body: schemas.ImputeRequest,
    visit: Visiting,
    accept: Annotated[str, Header(include_in_schema=False)] = "application/json",
) -> Any:
    """Complete images: posterior mean, standard deviation and independent draws.

    With `Accept: image/png` the answer is the one completed picture: the mean, or the draw or the
    median when that alone is in `outputs`.
    """
    Imputing.check(body)
    model = await visit.model(body.model)
    as_picture = "image/png" in accept and "application/json" not in accept
    if as_picture and len(body.images) != 1:
        raise NotAcceptable.of("images", "one image for image/png", str(len(body.images)))
    pictures = await _read(visit, [(i.image, i.mask, None) for i in body.images], model)
    if as_picture:
        body = body.model_copy(update={"draws": max(body.draws, 1)})
    operation = Imputing(body, model, a_seed(body.seed))
    done: list[Imputation] = await visit.results(list(map(operation.job, count(), pictures)))
    answer = await visit.coded(
        "encode",
        _picture if as_picture else _imputed,
        *(operation, body.images, pictures, done),
        pictures=len(pictures) * (len(body.outputs) + body.draws + len(body.levels)),
        shape=model.card.architecture.image_shape,
    )
    answer.headers.update(visit.clock.header)
    return answer


@forms.post(
    "/log-likelihood",
    openapi_extra=_form(
        "image",
        "mask",
        "truth",
        model="string",
        particles="integer",
        tolerance="number",
        quality="string",
        estimator="string",
        seed="integer",
    ),
)
async def log_likelihood(
    body: schemas.LogLikelihoodRequest, visit: Visiting, response: Response
) -> schemas.LogLikelihoodResponse:
    """Estimate log p of the observed pixels and, given the truth, of the missing ones."""
    LogLikelihood.check(body)
    model = await visit.model(body.model)
    pictures = await _read(visit, [(i.image, i.mask, i.truth) for i in body.images], model)
    operation = LogLikelihood(body, model, a_seed(body.seed))
    done: list[Scoring] = await visit.results(list(map(operation.job, count(), pictures)))
    response.headers.update(visit.clock.header)
    told = results(operation, [item.id for item in body.images], pictures, done)
    return schemas.LogLikelihoodResponse(model=model.name, results=told)


@router.post("/samples", dependencies=[Depends(_json_body)])
async def samples(
    body: schemas.SamplesRequest, visit: Visiting, response: Response
) -> schemas.SamplesResponse:
    """Draw images from the model itself."""
    model = await visit.model(body.model)
    seed = a_seed(body.seed)
    (drawn,) = await visit.results([Sample(model=model, count=body.count, seed=seed)])
    encoded = await visit.coded(
        "encode",
        lambda: [codec.encode(image, body.encoding) for image in drawn],
        pictures=body.count,
        shape=model.card.architecture.image_shape,
    )
    response.headers.update(visit.clock.header)
    return schemas.SamplesResponse(model=model.name, samples=encoded, seed=seed)


@router.get("/models")
async def models(visit: Visiting) -> schemas.Models:
    """List the models."""
    summaries = [
        schemas.ModelSummary(
            name=name,
            default=name == visit.here["default_model"],
            image_shape=card.architecture.image_shape,
            likelihood=card.architecture.likelihood,
            objective=card.objective,
            missing=card.missing,
            weights_sha256=card.weights_sha256,
        )
        for name, card in (await asyncio.to_thread(visit.here["models"].cards)).items()
    ]
    return schemas.Models(models=summaries)


@router.get("/models/{name}")
async def model(name: str, visit: Visiting) -> dict[str, Any]:
    """Show all that is known about a model: its card."""
    return asdict((await visit.model(name)).card)


@health.get("/health/live")
async def live() -> schemas.Health:
    """Say that the process answers."""
    return schemas.Health(status="ok")


@health.get("/health/ready", responses={503: PROBLEMS[503]})
async def ready(request: Request) -> schemas.Health:
    """Say that the models are loaded and the engine does its work."""
    if not cast("State", request.state)["engine"].ready:
        raise NotReady("The engine is starting, shutting down or stuck.")
    return schemas.Health(status="ok")


@health.get("/", include_in_schema=False)
async def root() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("docs")


router.include_router(forms)
WORK = tuple(
    f"{router.prefix}{route.path}" for route in forms.routes if isinstance(route, APIRoute)
)
"""Addresses whose requests are not read where they would be refused."""


async def _read(visit: Visit, items: list[tuple[Any, Any, Any]], model: Model) -> list[Pictures]:
    """The pictures with their holes, and the truths where they were sent."""
    shape = model.card.architecture.image_shape

    def work() -> list[Pictures]:
        return [
            read(image, mask, truth, shape, field=f"images[{index}].")
            for index, (image, mask, truth) in enumerate(items)
        ]

    return await visit.coded("decode", work, pictures=3 * len(items), shape=shape)


def _imputed(
    operation: Imputing,
    items: list[schemas.Item],
    pictures: list[Pictures],
    done: list[Imputation],
) -> Response:
    told = results(operation, [item.id for item in items], pictures, done)
    # one by one: a large answer in one piece would keep Python's lock, and all wait, for seconds
    lines = (_json(result.model_dump()) for result in told)
    text = f'{{"model":{_json(operation.model.name)},"results":[{",".join(lines)}]}}'
    return Response(text, media_type="application/json")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _picture(
    operation: Imputing,
    _items: list[schemas.Item],
    pictures: list[Pictures],
    done: list[Imputation],
) -> Response:
    ((picture,), (imputation,)) = pictures, done
    chosen = imputation.mean
    if operation.options.outputs == ["draws"]:
        chosen = imputation.draws[0]
    if operation.options.outputs == ["median"]:
        chosen = imputation.quantiles[-1]
    headers = {
        "X-Seed": str(operation.seed),
        "X-Model": quote(operation.model.name),
        "X-Log-Likelihood": f"{imputation.log_likelihood.value:.4f}",
        "X-Standard-Error": f"{imputation.log_likelihood.standard_error:.4f}",
        "X-Quality": imputation.quality,
    }
    return Response(
        codec.to_png(picture.image.completed(chosen)), media_type="image/png", headers=headers
    )
