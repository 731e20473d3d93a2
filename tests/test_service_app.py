"""The application: its life, and how failures leave it."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from model.checkpoint import CheckpointError
from service.app import create_app
from service.engine import Engine
from service.models import Models
from tests.wire import settings_for, write_checkpoint

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
IMAGE = {"image": [[0, 1, 0, 1, 0]] * 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model."""
    path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(path)
    return path


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """The engines that applications make."""
    made: list[Engine] = []

    def recorded(*arguments: Any, **options: Any) -> Engine:
        made.append(Engine(*arguments, **options))
        return made[-1]

    monkeypatch.setattr("service.app.Engine", recorded)
    return made


@asynccontextmanager
async def _running(app: FastAPI) -> AsyncGenerator[httpx.AsyncClient]:
    """A client of a started application, without a server."""
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport = httpx.ASGITransport(with_state, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def _run(scenario: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(scenario(), 60))


def _get(app: FastAPI, path: str) -> httpx.Response:
    async def scenario() -> httpx.Response:
        async with _running(app) as client:
            return await client.get(path)

    return _run(scenario)


def _problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert (document["status"], document["type"]) == (status, f"urn:miss-iwem:problem:{slug}")
    return document


def test_nothing_is_opened_before_the_start(tmp_path: Path, engines: list[Engine]):
    """An application is built without a folder or a thread; it is the start that needs them."""
    app = create_app(settings_for(tmp_path / "nowhere"))
    assert not engines

    with pytest.raises(CheckpointError, match="default model tiny"):
        _get(app, "/health/live")


def test_the_engine_lives_as_long_as_the_application(folder: Path, engines: list[Engine]):
    """It is ready when the first request comes, and has ended when the last has gone."""

    async def scenario() -> None:
        async with _running(create_app(settings_for(folder))) as client:
            assert engines[0].ready
            assert (await client.get("/health/ready")).status_code == 200
        assert not engines[0].ready

    _run(scenario)
    assert "engine" not in {thread.name for thread in threading.enumerate()}


def test_a_service_that_stops_is_alive_but_not_ready(folder: Path, engines: list[Engine]):
    """While it drains: 503 with a time to come back; cards are still read."""

    async def scenario() -> None:
        async with _running(create_app(settings_for(folder))) as client:
            engines[0].stop(seconds=5)
            ready = await client.get("/health/ready")
            impute = await client.post("/v1/impute", json={"images": [IMAGE], "particles": 1})
            for answer in (ready, impute):
                _problem(answer, 503, "not-ready")
                assert answer.headers["retry-after"] == "1"
            assert (await client.get("/health/live")).status_code == 200
            assert (await client.get("/v1/models/tiny")).status_code == 200

    _run(scenario)


def test_a_fault_is_a_problem_that_says_nothing_of_it(folder: Path):
    """What was not foreseen is a 500 without its words, which are in the log."""
    app = create_app(settings_for(folder))

    @app.get("/fault")
    async def fault() -> None:
        raise RuntimeError("a secret")

    document = _problem(_get(app, "/fault"), 500, "failed")
    assert "secret" not in str(document)


def test_failures_that_others_word_are_problems_too(folder: Path):
    """A refusal of the framework, or a plain answer from below, is the same kind of document."""
    app = create_app(settings_for(folder, max_body=77))

    @app.get("/refused")
    async def refused() -> None:
        raise HTTPException(403, "Not for you.", headers={"X-Why": "because"})

    for status in (400, 413, 502):
        app.add_api_route(f"/{status}", lambda s=status: PlainTextResponse("no " * 9, s))

    answer = _get(app, "/refused")
    assert _problem(answer, 403, "forbidden")["detail"] == "Not for you."
    assert answer.headers["x-why"] == "because"
    _problem(_get(app, "/400"), 400, "bad-request")
    _problem(_get(app, "/502"), 502, "bad-gateway")
    assert "77 bytes" in _problem(_get(app, "/413"), 413, "too-large")["detail"]


def test_answers_that_are_no_failures_pass(folder: Path):
    """The documents, the description and redirects are nobody's problem."""
    app = create_app(settings_for(folder))

    assert _get(app, "/docs").status_code == 200
    assert _get(app, "/").status_code == 307
    assert _get(app, "/openapi.json").json()["info"]["title"] == "miss-IWEM"


def test_every_setting_reaches_its_part(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is set is what the engine and the models are made with."""
    given: dict[str, Any] = {}

    def read(folder: Path, *, device: str, memory: int) -> Models:
        given["Models"] = folder, device, memory
        return Models(folder, device=device, memory=memory)

    def made(
        *, threads: int, max_request: int, max_waiting: int, on_lost: Callable[[], None]
    ) -> Engine:
        given["Engine"] = threads, max_request, max_waiting
        return Engine(
            threads=threads, max_request=max_request, max_waiting=max_waiting, on_lost=on_lost
        )

    monkeypatch.setattr("service.app.Engine", made)
    monkeypatch.setattr("service.app.Models", read)
    settings = settings_for(folder, threads=2, max_request=500, max_waiting=900, max_models=70_000)
    _get(create_app(settings), "/health/live")

    assert given == {"Engine": (2, 500, 900), "Models": (folder, "cpu", 70_000)}


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path):
    """A service whose default model is not there does not start, and says which there are."""
    write_checkpoint(tmp_path, "other")
    with pytest.raises(CheckpointError, match="one of other; got 'tiny'"):
        _get(create_app(settings_for(tmp_path)), "/health/live")

    assert "engine" not in {thread.name for thread in threading.enumerate()}


# The process


@contextmanager
def _process(
    folder: Path, *, program: Sequence[str] = ("-m", "service"), **environment: str
) -> Generator[tuple[subprocess.Popen[str], str]]:
    """`python -m service serve` as a process of its own, and its address."""
    variables = {
        **os.environ,
        "MISS_IWEM_CHECKPOINTS": str(folder),
        "MISS_IWEM_MODEL": "tiny",
        "MISS_IWEM_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, *program, "serve", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        try:
            for line in process.stderr:
                said += line
                if found := re.search(r"running on (http://\S+)", line):
                    yield process, found[1]
                    break
            else:
                raise AssertionError(said)
        finally:
            process.kill()


def _worked_on(url: str, pool: ThreadPoolExecutor, **large: Any) -> Future[httpx.Response]:
    """A request that is being worked on, of a service that takes one at a time."""

    def until_admitted() -> httpx.Response:
        while True:
            body = {**large, "particles": 100_000}
            answer = httpx.post(f"{url}/v1/impute", json=body, timeout=60)
            if answer.status_code != 429:
                return answer

    answer = pool.submit(until_admitted)
    small = {"images": [IMAGE], "particles": 1}
    while httpx.post(f"{url}/v1/impute", json=small, timeout=60).status_code != 429:
        assert not answer.done(), answer.result().text
    return answer


def test_what_outlasts_the_end_of_a_process_is_answered(folder: Path):
    """A request for which there is no time left is 503, which a client sends again elsewhere."""
    limits = {"MISS_IWEM_DRAIN": "0.1", "MISS_IWEM_MAX_REQUEST": "100000000"}
    with _process(folder, MISS_IWEM_MAX_WAITING="1", **limits) as (process, url):
        with ThreadPoolExecutor(1) as pool:
            answer = _worked_on(url, pool, images=[IMAGE] * 64)
            process.send_signal(signal.SIGTERM)
            refusal = answer.result(60)

        assert refusal.status_code == 503
        assert refusal.json()["detail"] == "The service is shutting down."
        assert int(refusal.headers["Retry-After"]) > 0


def test_a_process_that_is_told_to_end_finishes_its_work(folder: Path):
    """After SIGTERM a request that was being worked on is answered, and the exit code is 0.

    What was refused meanwhile has no lines of its own in the log, which tells their number.
    """
    with _process(folder, MISS_IWEM_MAX_WAITING="1") as (process, url):
        with ThreadPoolExecutor(1) as pool:
            answer = _worked_on(url, pool, images=[IMAGE])
            process.send_signal(signal.SIGTERM)
            (result,) = answer.result(60).json()["results"]
        said, accesses = process.stderr, process.stdout
        assert said is not None
        assert accesses is not None
        told = said.read()

        assert "Traceback" not in told
        assert "refused since" in told
        assert {line.split()[-2] for line in accesses} == {"200"}
        assert result["log_likelihood"]["particles"] == 100_000
        assert process.wait(60) == 0


LOSING = """
from service import cli, engine
from service.work import Sample

Sample.together = lambda jobs: 1 / 0
engine._device_lost = lambda: True
cli.app()
"""


def test_a_process_whose_device_fails_for_good_ends_as_failed(folder: Path):
    """The request may be sent again, to the process that is begun in place of this one."""
    with _process(folder, program=("-c", LOSING)) as (process, url):
        answer = httpx.post(f"{url}/v1/samples", json={}, timeout=60)

        assert answer.status_code == 503
        assert "device" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) > 0
        assert process.wait(60) == 1
