"""A client of the routes of batches, which needs nothing else of the service.

    with Client("http://127.0.0.1:8000") as client:
        batch = client.submit(Path("digits.npz"), operation="impute", draws=5)
        *_, batch = client.watch(batch.id)
        client.results(batch.id, Path("results.jsonl"))

What breaks off, or finds the service busy or away, is tried again: a batch is handed in with a key
and so only once, and a download goes on where it was.
"""

import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import httpx

__all__ = ["Batch", "Client", "Problem", "Unreachable"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a batch is, as the service tells it."""

    id: str
    state: str
    operation: str
    options: dict[str, Any]
    """All of them, with the seed."""
    format: str
    model: str
    weights_sha256: str
    bytes: int
    total: int | None
    """Items; None until the file has been gone through."""
    done: int
    failed: int
    rate: float | None
    """Items a second."""
    eta: float | None
    """Seconds that are left at this rate."""
    problem: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None

    @classmethod
    def of(cls, told: dict[str, Any]) -> Self:
        """What a service tells, which may be more than is known here."""
        known: dict[str, Any] = {field.name: told[field.name] for field in fields(cls)}
        for name in TIMES:
            known[name] = known[name] and datetime.fromisoformat(known[name])
        return cls(**known)


class Problem(Exception):
    """What the service does not do, with its sentence that says why."""

    def __init__(self, status: int, document: dict[str, Any], *, retry_after: float) -> None:
        self.status, self.retry_after = status, retry_after
        self.detail: str = document.get("detail") or (
            f"Expected an answer of the service; got the status {status} of something else."
        )
        self.type: str = document.get("type", "about:blank")
        self.errors: list[dict[str, str]] = document.get("errors", [])
        """The fields that were wrong, each with what was expected and what came."""
        super().__init__(self.detail)


class Unreachable(Exception):
    """There is no service at the address, or none that stays."""


class Client:
    """Hands batches in to a service, and gets their states and files."""

    def __init__(
        self,
        address: str,
        *,
        tries: int = 5,
        timeout: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._address, self._tries = address, tries
        self._http = httpx.Client(
            base_url=address,
            timeout=httpx.Timeout(timeout, connect=10.0),
            follow_redirects=True,  # a bucket gives its files out itself
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def submit(
        self, path: Path, *, operation: str, key: str | None = None, **options: Any
    ) -> Batch:
        """The batch of a file; the same key is the same batch, however often it is sent.

        Raises:
            Problem: It is refused.
            Unreachable: There is no service.
        """
        told = {name: value for name, value in options.items() if value is not None}
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        asked = {"params": {"operation": operation, **told}, "headers": headers}
        return Batch.of(self._ask("POST", BATCHES, file=path, **asked).json())

    def state(self, name: str) -> Batch:
        """How a batch is."""
        return Batch.of(self._ask("GET", f"{BATCHES}/{name}").json())

    def states(self, *, limit: int = 20, offset: int = 0) -> list[Batch]:
        """How so many batches are, the latest first."""
        page = {"limit": limit, "offset": offset}
        return [
            Batch.of(told) for told in self._ask("GET", BATCHES, params=page).json()["batches"]
        ]

    def watch(self, name: str, *, every: float = 1.0) -> Iterator[Batch]:
        """How a batch is from now on, so many seconds apart; the last is its end."""
        while True:
            yield (batch := self.state(name))
            if batch.finished_at is not None:
                return
            time.sleep(every)

    def results(self, name: str, path: Path) -> None:
        """Writes the results of a batch that is done to a file, which is there when all are."""
        self._download(f"{BATCHES}/{name}/results", path)

    def errors(self, name: str, path: Path) -> None:
        """Writes a line for each item that has no result to a file."""
        self._download(f"{BATCHES}/{name}/errors", path)

    def cancel(self, name: str) -> Batch:
        """Has no more of a batch done; what has ended stays as it is."""
        return Batch.of(self._ask("POST", f"{BATCHES}/{name}/cancel").json())

    def delete(self, name: str) -> None:
        """Has a batch that has ended forgotten, with its results."""
        tries = itertools.count()

        def once() -> None:
            again = next(tries)
            try:
                self._once("DELETE", f"{BATCHES}/{name}")
            except Problem as problem:  # it went, and only the answer did not come
                if not again or problem.status != HTTPStatus.NOT_FOUND:
                    raise

        self._lasting(once)

    def _ask(self, method: str, address: str, **options: Any) -> httpx.Response:
        return self._lasting(lambda: self._once(method, address, **options))

    def _once(
        self, method: str, address: str, *, file: Path | None = None, **options: Any
    ) -> httpx.Response:
        with file.open("rb") if file else nullcontext() as content:
            answer = self._http.request(method, address, content=content, **options)
        return _good(answer)

    def _lasting(self, work: Callable[[], T], *, moved: Callable[[], int] = int) -> T:
        """What comes of work that is tried again where that may help, or while it moves on."""
        tries, before = 0, moved()
        while True:
            try:
                return work()
            except httpx.TransportError as error:
                trouble, pause = self._unreachable(error), 0.0
            except Problem as problem:
                trouble, pause = problem, problem.retry_after
                if problem.status not in AGAIN:
                    raise
            tries, before = (1 if moved() > before else tries + 1), moved()
            if tries >= self._tries:
                raise trouble
            time.sleep(max(pause, PAUSE * 2**tries))

    def _unreachable(self, error: httpx.TransportError) -> Unreachable:
        trouble = Unreachable(f"Expected a service at {self._address}; got: {error}.")
        trouble.__cause__ = error
        return trouble

    def _download(self, address: str, path: Path) -> None:
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            download = _Download(self._http, address, file)
            self._lasting(download.more, moved=file.tell)
        part.replace(path)


class _Download:
    """A file on its way, which goes on where it broke off if it still is the same."""

    def __init__(self, http: httpx.Client, address: str, file: IO[bytes]) -> None:
        self._http, self._address, self._file = http, address, file
        self._tag: str | None = None

    def more(self) -> None:
        """Gets what is not there yet."""
        headers = {"Accept-Encoding": "identity"}  # parts are those of the file
        if self._tag and self._file.tell():
            headers |= {"Range": f"bytes={self._file.tell()}-", "If-Range": self._tag}
        with self._http.stream("GET", self._address, headers=headers) as answer:
            if not answer.is_success:
                answer.read()
            if _good(answer).status_code != HTTPStatus.PARTIAL_CONTENT:
                self._file.seek(0)
                self._file.truncate()
            self._tag = answer.headers.get("ETag")
            for block in answer.iter_bytes():
                self._file.write(block)


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    after = answer.headers.get("Retry-After", "")
    pause = min(float(after), LONGEST) if after.isdecimal() else 0.0
    kind = answer.headers.get("Content-Type", "")
    told = answer.json() if kind.startswith("application/problem+json") else {}
    raise Problem(answer.status_code, told, retry_after=pause)


BATCHES = "/v1/batches"
TIMES = ("created_at", "started_at", "finished_at", "expires_at")
AGAIN = {
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,  # what stands before the service says so when a process of it has died
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
}
PAUSE = 0.25
"""Seconds, doubled at every try."""
LONGEST = 60.0
"""Seconds that are waited, however many the service asks for."""
