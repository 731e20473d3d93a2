"""The application: what it is built from, what lives as long as it, and how failures leave it."""

import asyncio
import gc
import json
import logging
import os
import reprlib
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from importlib import metadata
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import api, batch_api, codec, schemas
from service.batches import Batches
from service.engine import LOST, Engine
from service.errors import (
    MEDIA_TYPE,
    BadInput,
    BadRequest,
    Failed,
    FieldError,
    NotReady,
    Problem,
    TooLarge,
    problem_document,
)
from service.models import Models
from service.settings import Settings
from service.store import Store, Unreachable
from service.worker import Worker

__all__ = ["create_app", "working"]

log = logging.getLogger(__name__)
T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened before it starts.

    Its `state.status` is the status that the process is to end with.
    """
    app = _Application(
        title="miss-IWEM",
        summary="Several honest completions, with a likelihood, for images with missing pixels.",
        version=metadata.version("miss-iwem"),
        lifespan=_lifespan(settings),
        responses={422: {"model": schemas.ProblemDocument}},
    )
    app.state.status = 0
    app.add_middleware(ProblemDocuments, max_body=settings.max_body)
    app.exception_handler(Problem)(_problem)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)
    app.exception_handler(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)(_too_large)
    app.exception_handler(api.ClientGone)(_gone)
    app.exception_handler(Exception)(_fault)
    app.include_router(api.router, max_body_size=settings.max_body)
    app.include_router(api.health)
    if settings.batches:
        app.include_router(batch_api.router)
    return app


class _Application(FastAPI):
    """Refuses work for which there is no room before anything is done for it.

    Of many that come at once most are refused, and what that takes the model has to wait for: not
    even the framework's own layers come first.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on but what is refused."""
        work = scope["type"] == "http" and scope["path"].endswith(api.WORK)
        if work and scope["method"] == "POST":
            try:
                scope["state"]["engine"].refuse_early()
            except Problem as problem:
                answer = _answer(problem.document(), problem.headers)
                return await answer(scope, receive, send)
        return await self._whole(scope, receive, send)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has a request answered, though the server drops what outlasts its end."""
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await super().__call__(scope, receive, sending)
        except asyncio.CancelledError:
            if begun or scope["type"] != "http":
                raise
            problem = NotReady("The service is shutting down.")
            await _answer(problem.document(), problem.headers)(scope, receive, send)


def _lifespan(
    settings: Settings,
) -> Callable[[FastAPI], AbstractAsyncContextManager[api.State]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[api.State]:
        def failed() -> None:
            app.state.status = 1  # who watches over this process begins another
            os.kill(os.getpid(), signal.SIGTERM)

        models = Models(settings.checkpoints, device=settings.device, memory=settings.max_models)
        engine = _engine(settings, on_lost=failed)
        engine.start()
        try:
            await asyncio.to_thread(models.start, settings.model)
            await asyncio.to_thread(codec.warm)
            gc.collect()
            gc.freeze()  # libraries and models stay: no collection shall walk them while all wait
            async with AsyncExitStack() as stack:
                codecs = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="codec"))
                batches = await stack.enter_async_context(_batches(settings, engine))
                yield api.State(
                    engine=engine,
                    models=models,
                    default_model=settings.model,
                    timeout=settings.timeout,
                    codecs=codecs,
                    batches=batches,
                )
        finally:
            await asyncio.to_thread(engine.stop, seconds=settings.drain)

    return lifespan


def _engine(settings: Settings, *, on_lost: Callable[[], None]) -> Engine:
    return Engine(
        threads=settings.threads,
        max_request=settings.max_request,
        max_waiting=settings.max_waiting,
        on_lost=on_lost,
    )


def working(settings: Settings) -> None:
    """Works on batches and nothing else, until it is told to end by SIGTERM or SIGINT."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    engine = _engine(settings, on_lost=ended.set)
    store, database = _begun(lambda: Store(settings.batches)), settings.database_address
    worker = Worker(store, database, engine, device=settings.device)
    engine.start()
    _begun(worker.start)
    log.warning("Working on the batches of %s.", settings.batches)
    ended.wait()
    worker.stop()
    engine.stop(seconds=settings.drain)
    if engine.lost:
        raise SystemExit(LOST)


def _begun(begin: Callable[[], T]) -> T:
    """Begins what needs a database, or a place for files, and says which cannot be reached."""
    try:
        return begin()
    except DBAPIError as error:
        raise SystemExit(f"Expected a database; got: {error.orig}") from None
    except (OSError, Unreachable) as error:
        raise SystemExit(f"Expected a place for batches; got: {error}") from None


@asynccontextmanager
async def _batches(settings: Settings, engine: Engine) -> AsyncGenerator[Batches | None]:
    """What takes batches in, and what works on them, if that is here."""
    if not settings.batches:
        yield None
        return
    store, database = _begun(lambda: Store(settings.batches)), settings.database_address
    batches = Batches(
        store,
        database,
        max_request=settings.max_request,
        max_batch=settings.max_batch,
        quota=settings.quota,
        keep=HOUR * settings.results_ttl,
    )
    worker = Worker(store, database, engine, device=settings.device)
    await asyncio.to_thread(_begun, worker.start if settings.work else worker.prepare)
    sweeping = asyncio.create_task(batches.keep_clean())
    try:
        yield batches
    finally:
        sweeping.cancel()
        await asyncio.to_thread(worker.stop)
        batches.stop()


HOUR = 3600


async def _problem(_request: Request, problem: Problem) -> Response:
    return _answer(problem.document(), problem.headers)


async def _invalid(_request: Request, invalid: RequestValidationError) -> Response:
    errors = [error for error in invalid.errors() if error["type"] == "json_invalid"]
    if errors:
        reason = errors[0].get("ctx", {}).get("error", "")
        return _answer(
            BadRequest(f"Expected a JSON body; got text that is not: {reason}.").document()
        )
    fields = [_field_error(error) for error in invalid.errors()[:MOST_TOLD]]
    return _answer(BadInput(" ".join(map(str, fields)), *fields).document())


MOST_TOLD = 20
"""Of what is wrong with one request."""


def _field_error(error: dict[str, Any]) -> FieldError:
    path = error["loc"][1:]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    got = "nothing" if error["type"] == "missing" else reprlib.repr(error.get("input"))
    expected = EXPECTED.get(error["type"]) or _lower(error["msg"])
    return FieldError(name.lstrip(".") or "body", expected, got)


EXPECTED = {"missing": "a value", "extra_forbidden": "no field of this name"}


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


async def _refused(_request: Request, refusal: HTTPException) -> Response:
    document = _framework_document(refusal.status_code, str(refusal.detail))
    return _answer(document, dict(refusal.headers or {}))


async def _too_large(_request: Request, _refusal: Exception) -> Response:
    """For ProblemDocuments to word, which knows the limit."""
    return PlainTextResponse("", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


async def _gone(_request: Request, _gone: api.ClientGone) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _fault(_request: Request, _error: Exception) -> Response:
    return _answer(Failed("The service failed; its log says why.").document())


def _answer(document: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(document), document["status"], headers=headers, media_type=MEDIA_TYPE
    )


class ProblemDocuments:
    """Turns the failures that the framework words itself, such as 413, into problem documents."""

    def __init__(self, app: ASGIApp, *, max_body: int) -> None:
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on but foreign failures."""
        foreign: list[int] = []

        async def translate(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_foreign(message):
                foreign.append(message["status"])
            elif foreign and not message.get("more_body"):
                await self._document(foreign.pop())(scope, receive, send)
            elif not foreign:
                await send(message)

        await self.app(scope, receive, translate)

    def _document(self, status: int) -> Response:
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return _answer(
                TooLarge.of("body", f"at most {self.max_body} bytes", "more").document()
            )
        return _answer(_framework_document(status, HTTPStatus(status).phrase))


def _is_foreign(start: Message) -> bool:
    kind = dict(start["headers"]).get(b"content-type", b"").decode()
    return start["status"] >= HTTPStatus.BAD_REQUEST and bool(kind) and kind != MEDIA_TYPE


def _framework_document(status: int, detail: str) -> dict[str, Any]:
    slug = HTTPStatus(status).phrase.lower().replace(" ", "-")
    return problem_document(status, slug, detail)
