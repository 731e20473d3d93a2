"""Workers: processes that are killed, stopped and joined by others, and a database that goes."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
import requests
import schemathesis
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from service.worker import unresolved
from tests.wire import npy, random_levels, write_checkpoint

ROOT = Path(__file__).parent.parent
QUICK = (
    "import service.heartbeats as h, service.worker as w, service.batches as b;"
    "h.BEATING, h.OLD, w.POLLING, b.MOST_ITEMS = 0.2, 2.0, 0.05, 4;"
    "from service.cli import app; app()"
)
"""The command line, which takes a worker for dead sooner, and has small chunks."""
COUNT = 40
IMAGES = npy(np.stack([random_levels(seed) for seed in range(COUNT)]))
ASKED = {"operation": "impute", "particles": 5000, "seed": 3, "quality": "standard"}


def _programs() -> Path | None:
    """Where PostgreSQL's are: Debian does not put the server's on the path."""
    known = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = Path(known) if known else found[-1] if found else None
    return None if path is None else path.parent


@pytest.fixture(scope="module")
def postgres() -> Iterator["Postgres"]:
    """A PostgreSQL of its own."""
    if (programs := _programs()) is None:
        pytest.skip("PostgreSQL is not installed.")
    with TemporaryDirectory() as folder:
        server = Postgres(programs, Path(folder))
        server.start()
        yield server
        server.stop()


class Postgres:
    """A server that can be stopped and started."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        # it does not run as root
        self._user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync")

    def _run(self, program: str, *words: str) -> None:
        subprocess.run(
            [self._programs / program, "--pgdata", self._folder / "data", *words],
            check=True,
            capture_output=True,
            cwd=self._folder,
            user=self._user if os.geteuid() == 0 else None,
        )

    def start(self) -> None:
        """It listens afterwards."""
        options = f"-p {self._port} -k {self._folder} -c fsync=off -c max_connections=200"
        log = str(self._folder / "log")
        self._run("pg_ctl", "--wait", "start", "--log", log, "--options", options)

    def stop(self) -> None:
        """What is connected is cut off."""
        self._run("pg_ctl", "--wait", "stop", "--mode=immediate")

    def database(self) -> str:
        """The address of a new database."""
        name = f"d{os.urandom(6).hex()}"
        address = f"postgresql://postgres@127.0.0.1:{self._port}"
        with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"{address}/{name}"


class Process:
    """A service or a worker in a process of its own."""

    def __init__(self, command: str, folder: Path, **settings: Any) -> None:
        told = {
            "checkpoints": folder / "checkpoints",
            "model": "tiny",
            "batches": folder / "batches",
            "threads": 1,
            **settings,
        }
        self._environment = {f"MISS_IWEM_{name.upper()}": str(told[name]) for name in told}
        self._command, self.settings = command, told
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", QUICK, self._command],
            env={**os.environ, **self._environment, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """It ends at once, with whatever it was doing."""
        self.process.send_signal(number)
        self.process.wait()

    def again(self) -> None:
        """The same, begun anew."""
        self.process = self._start()


@contextmanager
def _running(command: str, folder: Path, **settings: Any) -> Generator[Process]:
    process = Process(command, folder, **settings)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, checkpoints: Path) -> Path:
    """With that model, and room for batches."""
    (tmp_path / "checkpoints").symlink_to(checkpoints)
    return tmp_path


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Client:
    """Of a service that may be away."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def ask(self, method: str, address: str, **options: Any) -> httpx.Response:
        """An answer, of which there is one when the service is ready."""
        while True:  # the test's own limit ends this
            try:
                answer = self.once(method, address, **options)
                if answer.status_code != 503:
                    return answer
            except httpx.TransportError:
                pass
            threading.Event().wait(0.05)

    def once(self, method: str, address: str, **options: Any) -> httpx.Response:
        """An answer, whatever it is."""
        url = f"{self._address}{address}"
        return httpx.request(
            method,
            url,
            timeout=10,
            follow_redirects=True,
            verify=False,  # or certificates are read each time, for plain HTTP
            **options,
        )

    def submit(self, key: str) -> str:
        """The address of a batch, which is one though it may be sent several times."""
        headers = {"Idempotency-Key": key}
        answer = self.ask("POST", "/v1/batches", params=ASKED, content=IMAGES, headers=headers)
        assert answer.status_code == 202, answer.text
        return answer.headers["Location"]

    def until(self, address: str, done: int) -> dict[str, Any]:
        """The state in which so many items have results."""
        while True:
            told = self.ask("GET", address).json()
            assert told["state"] in ("queued", "running", "done"), told
            if told["done"] >= done and (done < COUNT or told["state"] == "done"):
                return told
            threading.Event().wait(0.02)

    def results(self, address: str) -> bytes:
        """All of them, when all are there."""
        assert self.until(address, COUNT)["failed"] == 0
        return self.ask("GET", f"{address}/results").content


@pytest.fixture(scope="module")
def expected(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results without any disturbance, by a service that works alone."""
    port, folder = _free_port(), tmp_path_factory.mktemp("undisturbed")
    (folder / "checkpoints").symlink_to(checkpoints)
    with _running("serve", folder, http_port=port):
        client = Client(port)
        results = client.results(client.submit("whole"))
    assert len(results.splitlines()) == COUNT
    return results


def test_a_service_that_is_killed_goes_on_where_it_was(folder: Path, expected: bytes):
    """Killed again and again in the middle, a batch has the same bytes as undisturbed."""
    port = _free_port()
    client = Client(port)
    with _running("serve", folder, http_port=port) as service:
        address = client.submit("disturbed")

        for done in (1, 12, 24):
            client.until(address, done)
            service.kill()
            service.again()

        assert client.results(address) == expected


@contextmanager
def _cluster(
    folder: Path, database: str, workers: int, **settings: Any
) -> Generator[tuple[Client, list[Process]]]:
    port = _free_port()
    settings["database"] = database
    with ExitStack() as stack:
        stack.enter_context(_running("serve", folder, http_port=port, work=False, **settings))
        yield (
            Client(port),
            [stack.enter_context(_running("worker", folder, **settings)) for _ in range(workers)],
        )


def test_others_do_the_work_of_a_worker_that_is_gone(
    folder: Path, postgres: Postgres, expected: bytes
):
    """Of two workers one is killed and one hangs; whoever is left comes to the same bytes."""
    with _cluster(folder, postgres.database(), workers=2) as (client, (first, second)):
        address = client.submit("disturbed")

        client.until(address, 4)
        first.kill()
        client.until(address, 12)
        second.process.send_signal(signal.SIGSTOP)
        first.again()

        assert client.results(address) == expected
        second.process.send_signal(signal.SIGCONT)  # and does again what was done
        assert client.results(address) == expected


def test_a_database_that_comes_back_goes_on(folder: Path, postgres: Postgres, expected: bytes):
    """While PostgreSQL is away the service says so, and afterwards the batch is done."""
    with _cluster(folder, postgres.database(), workers=1) as (client, _):
        address = client.submit("disturbed")
        client.until(address, 4)

        postgres.stop()
        away = client.once("GET", address)
        postgres.start()

        assert (away.status_code, away.json()["type"]) == (503, "urn:miss-iwem:problem:not-ready")
        assert client.results(address) == expected


def test_a_worker_that_is_told_to_end_leaves_its_work_to_others(
    folder: Path, postgres: Postgres, expected: bytes
):
    """SIGTERM ends a worker soon, and what it had begun need not wait for its heart to stop."""
    with _cluster(folder, postgres.database(), workers=2) as (client, (first, _)):
        address = client.submit("disturbed")
        client.until(address, 4)

        first.kill(signal.SIGTERM)

        assert first.process.returncode == 0
        assert client.results(address) == expected


def test_a_database_without_an_address_is_one_that_is_away():
    """Where a name is not known, as that of a stopped container, the connection is lost."""
    engine = sa.create_engine("postgresql+psycopg://somebody@nowhere.invalid/some")
    event.listen(engine, "handle_error", unresolved)

    with pytest.raises(OperationalError) as away:
        engine.connect()

    assert away.value.connection_invalidated


def test_batches_may_be_in_a_bucket(
    folder: Path, postgres: Postgres, bucket: str, expected: bytes
):
    """What workers share may be a bucket, from which clients are given what they ask for."""
    with _cluster(folder, postgres.database(), workers=2, batches=f"{bucket}/batches") as (
        client,
        _,
    ):
        assert client.results(client.submit("bucket")) == expected

    assert not (folder / "batches").exists()


def test_a_worker_needs_a_database_that_others_can_reach(folder: Path):
    """Without PostgreSQL there is nothing to be one of several of."""
    with _running("worker", folder) as worker:
        assert worker.process.wait() == 2


def test_the_service_is_what_its_description_says(folder: Path):
    """Generated requests have documented statuses, types and bodies, and no faults."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with _running("serve", folder, http_port=port, max_body=2**16):
        Client(port).ask("GET", "/health/ready")
        tested = _hold(url)

    assert len(tested) == 14


def _hold(url: str) -> list[str]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    tested: list[str] = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        tested.append(operation.label)

        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(case=operation.as_strategy())
        def holds(case: schemathesis.Case) -> None:
            answer = case.call(session=session)
            late = answer.status_code == 504 and "X-Timeout-Ms" in (case.headers or {})
            case.validate_response(
                answer,
                checks=[
                    *([] if late else [not_a_server_error]),
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        with requests.Session() as session:
            holds()

    return tested
