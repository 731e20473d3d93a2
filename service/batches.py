"""Batches: files of images that are handed in, worked on somewhere, and come back as results.

What a batch is, is told by its spec and its files; how far it is, by the database that its workers
work from. Whoever has the two can take batches in and give results out, on any machine.
"""

import asyncio
import errno
import hashlib
import itertools
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from dbos import DBOSClient, DBOSPortableJSONSerializer, WorkflowStatus
from sqlalchemy.exc import DBAPIError

from service import schemas
from service.errors import (
    BadInput,
    Conflict,
    FieldError,
    Full,
    NotReady,
    Problem,
    TooLarge,
    UnknownBatch,
)
from service.items import read_items
from service.models import Model
from service.operations import OPERATIONS, Operation, a_seed, read
from service.results import FORMATS, Format
from service.store import Store, Unreachable

__all__ = [
    "APPLICATION",
    "BATCH",
    "BATCHES",
    "PROGRESS",
    "TROUBLE",
    "Batches",
    "Spec",
    "options_of",
    "plan",
]

log = logging.getLogger(__name__)
T = TypeVar("T")
APPLICATION, BATCH, BATCHES, PROGRESS, TROUBLE = (
    "miss-iwem",
    "batch",
    "batches",
    "progress",
    "trouble",
)
"""Names in the database: of the application, a workflow, its queue, an event and an attribute."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a batch is, from its beginning to its end."""

    id: str
    """Empty where nothing else is in its store."""
    operation: str
    options: dict[str, Any]
    """All of them, with the seed."""
    format: str
    model: str
    weights_sha256: str
    bytes: int
    fingerprint: str
    """Of what was asked for and of the file."""
    chunk: int
    """Items that are worked on at a time."""

    @property
    def form(self) -> Format:
        """That of the results."""
        return FORMATS[self.format]

    def operation_of(self, model: Model) -> Operation:
        """The operation, with the batch's options, by this model."""
        kind = OPERATIONS[self.operation]
        return kind(kind.Options(**self.options), model, self.seed)

    @property
    def seed(self) -> int:
        """That of the whole batch."""
        return int(self.options["seed"])

    @property
    def work(self) -> str:
        """Where its files are until it has ended; those of another that had its id are not."""
        return self.path(self.fingerprint)

    @property
    def upload(self) -> str:
        """What was handed in."""
        return f"{self.work}/{UPLOAD}"

    @property
    def checkpoint(self) -> str:
        """The model, as it was when the batch was handed in."""
        return f"{self.work}/model"

    def part(self, kind: str, number: int) -> str:
        """The items, results or errors of a chunk."""
        return f"{self.work}/{kind}/{number:06}"

    @property
    def results(self) -> str:
        """All results."""
        return self.path(f"results{self.form.suffix}")

    @property
    def errors(self) -> str:
        """A line for every item that has no result."""
        return self.path("errors.jsonl")

    def path(self, name: str) -> str:
        """Where something of the batch is."""
        return f"{self.id}/{name}" if self.id else name


@dataclass(frozen=True)
class Download:
    """A file that can be given out."""

    store: Store
    whole_name: str
    media_type: str

    @property
    def name(self) -> str:
        """What it may be saved as."""
        return self.whole_name.replace("/", "-")

    @property
    def path(self) -> Path | None:
        """Where it is, if that is on this machine."""
        return self.store.folder and self.store.folder / self.whole_name

    def address(self, *, seconds: int) -> str:
        """Where it may be read for so long, if it is in a bucket."""
        return self.store.signed(self.whole_name, seconds=seconds)


class Batches:
    """Takes batches in, says how they are, and gives their results out."""

    def __init__(
        self,
        store: Store,
        database: str,
        *,
        max_request: int,
        max_batch: int,
        quota: int,
        keep: float,
    ) -> None:
        self._store, self._database = store, database
        self._max_request, self._max_batch = max_request, max_batch
        self._quota, self._keep = quota, keep
        self._stray: dict[str, float] = {}
        """Files that the last sweep found to be of no batch, perhaps of one just begun."""

    @cached_property
    def _client(self) -> DBOSClient:
        return DBOSClient(
            system_database_url=self._database,
            serializer=DBOSPortableJSONSerializer(),
            application_name=APPLICATION,
            retry_connection_errors=False,
        )

    def stop(self) -> None:
        """Closes the connections."""
        if "_client" in self.__dict__:
            self._client.destroy()

    async def submit(
        self,
        asked: schemas.BatchQuery,
        model: Model,
        body: AsyncIterator[bytes],
        *,
        key: str | None,
    ) -> schemas.Batch:
        """Takes a batch in; the same key gets the same batch.

        Raises:
            BadInput: The options, or the first items, or a key that another batch has.
            UnknownFormat: A file that is none of those that can be read.
            TooLarge: More bytes than a batch may have, or more work than an item may.
            Full: No room.
            NotReady: The database, or where the files are, cannot be reached.
        """
        options_of(asked)  # what cannot be done need not come
        with self._store.begun() as path:
            digest = await self._receive(body, path)
            told = {**asked.model_dump(), "file": digest}
            fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
            name = uuid.uuid4().hex if key is None else hashlib.sha256(key.encode()).hexdigest()
            if known := await self._known(name[:32]):
                return await self._same(known, fingerprint)
            spec = await asyncio.to_thread(
                plan,
                asked,
                path,
                model,
                name=name[:32],
                fingerprint=fingerprint,
                max_request=self._max_request,
            )
            await self._ask(lambda: self._keep_files(spec, path, model))
        return await self._begin(spec)

    async def _receive(self, body: AsyncIterator[bytes], path: Path) -> str:
        """Writes what comes to the disk as it comes; the SHA-256 of all."""
        used = await self._ask(self._store.size)
        size, digest = 0, hashlib.sha256()
        try:
            with path.open("wb") as file:
                async for block in _blocks(body):
                    size += len(block)
                    if size > self._max_batch:
                        raise TooLarge.of("body", f"at most {self._max_batch} bytes", "more")
                    if used + size > self._quota:
                        raise Full(
                            f"Expected room for a file; got {used} of {self._quota} bytes that "
                            "are taken. Delete a batch, or wait until one expires."
                        )
                    await asyncio.to_thread(_write, block, file, digest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Full(f"Expected room for a file; got: {error.strerror}.") from error
        return digest.hexdigest()

    def _keep_files(self, spec: Spec, path: Path, model: Model) -> None:
        """Puts what workers need where they find it."""
        with self._store.writing(spec.checkpoint) as folder:
            model.write(folder)
        self._store.place(path, spec.upload)

    async def _begin(self, spec: Spec) -> schemas.Batch:
        """Has the batch worked on, unless another has taken its key in the meantime."""
        await self._ask(
            lambda: self._client.enqueue(
                {"workflow_name": BATCH, "queue_name": BATCHES, "workflow_id": spec.id},
                asdict(spec),
            )
        )
        status = await self._status(spec.id)
        if _spec(status).fingerprint != spec.fingerprint:
            await self._ask(lambda: self._store.remove(spec.work))
        return await self._same(status, spec.fingerprint)

    async def _same(self, status: WorkflowStatus, fingerprint: str) -> schemas.Batch:
        if _spec(status).fingerprint != fingerprint:
            raise BadInput.of(
                "Idempotency-Key", "the file and the options that it came with before", "others"
            )
        return await self._batch(status)

    async def get(self, name: str) -> schemas.Batch:
        """How a batch is.

        Raises:
            UnknownBatch: There is none of this id.
            NotReady: The database cannot be reached.
        """
        return await self._batch(await self._status(name))

    async def list(self, *, limit: int, offset: int) -> schemas.Batches:
        """Some of the batches, the latest first."""
        found = await self._ask(
            lambda: self._client.list_workflows(
                name=BATCH, limit=limit + 1, offset=offset, sort_desc=True
            )
        )
        return schemas.Batches(
            batches=[await self._batch(status) for status in found[:limit]],
            next=offset + limit if len(found) > limit else None,
        )

    async def cancel(self, name: str) -> schemas.Batch:
        """Has no more of it done; what has ended stays as it is."""
        await self._status(name)
        await self._ask(lambda: self._client.cancel_workflow(name, cancel_children=True))
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Forgets a batch with its results.

        Raises:
            UnknownBatch: There is none of this id.
            Conflict: It has not ended.
        """
        batch = await self.get(name)
        if batch.finished_at is None:
            raise Conflict(f"Expected a batch that has ended; got one that is {batch.state}.")
        await self._ask(lambda: self._store.remove(name))
        await self._ask(lambda: self._client.delete_workflow(name, delete_children=True))

    async def file(self, name: str, *, errors: bool) -> Download:
        """The results, or the errors.

        Raises:
            UnknownBatch: There is no batch of this id.
            Conflict: It has no results.
        """
        status = await self._status(name)
        if (state := STATES[status.status]) != "done":
            raise Conflict(f"Expected a batch that is done; got one that is {state}.")
        spec = _spec(status)
        if errors:
            return Download(self._store, spec.errors, "application/jsonl")
        return Download(self._store, spec.results, spec.form.media_type)

    async def keep_clean(self) -> None:
        """Forgets what is old, now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEPING)
            try:
                await self.sweep()
            except Exception:
                log.warning("Old batches could not be forgotten.", exc_info=True)

    async def sweep(self) -> None:
        """Forgets what ended long ago, and the files of what was never handed in to its end."""
        before = datetime.fromtimestamp(time.time() - self._keep, UTC).isoformat()
        old = await self._ask(
            lambda: self._client.list_workflows(
                name=BATCH, completed_before=before, load_output=False
            )
        )
        for status in old:
            await self.delete(status.workflow_id)
        names = await asyncio.to_thread(self._store.names)
        stray = {name for name in names if ID.fullmatch(name) and not await self._known(name)}
        now = time.monotonic()
        self._stray = {name: self._stray.get(name, now) for name in stray}
        for name, since in self._stray.items():
            if since < now - 3600 * UPLOADING:  # until then somebody may be placing its files
                await asyncio.to_thread(self._store.remove, name)
        await asyncio.to_thread(self._store.forget_begun, hours=UPLOADING)

    async def _known(self, name: str) -> WorkflowStatus | None:
        found = await self._ask(
            lambda: self._client.list_workflows(name=BATCH, workflow_ids=[name])
        )
        return found[0] if found else None

    async def _status(self, name: str) -> WorkflowStatus:
        status = await self._known(name) if ID.fullmatch(name) else None
        if status is None:
            raise UnknownBatch.of("id", "that of a batch", repr(name[:80]))
        return status

    async def _batch(self, status: WorkflowStatus) -> schemas.Batch:
        spec, state = _spec(status), STATES[status.status]
        told = await self._ask(lambda: self._client.get_event(status.workflow_id, PROGRESS, 0))
        progress: dict[str, Any] = told or {}
        ended = int(progress.get("done", 0) + progress.get("failed", 0))
        seconds = progress.get("at", 0) - progress.get("since", 0)
        rate = ended / seconds if ended and seconds > 0 else None
        total = progress.get("total")
        left = (total - ended) / rate if rate and total and state == "running" else None
        finished = _time(status.completed_at)
        created = cast("datetime", _time(status.created_at))
        started = _time(int(1000 * progress["since"])) if progress else None
        if started is not None:  # a database may know seconds only
            started = min(max(started, created), finished or started)
        trouble = (status.attributes or {}).get(TROUBLE)
        return schemas.Batch(
            id=spec.id,
            state=state,
            operation=spec.operation,
            options=spec.options,
            format=spec.format,
            model=spec.model,
            weights_sha256=spec.weights_sha256,
            bytes=spec.bytes,
            total=total,
            done=progress.get("done", 0),
            failed=progress.get("failed", 0),
            rate=rate,
            eta=left,
            problem=str(status.error) if status.error else trouble,
            created_at=created,
            started_at=started,
            finished_at=finished,
            expires_at=finished and datetime.fromtimestamp(finished.timestamp() + self._keep, UTC),
        )

    @staticmethod
    async def _ask(question: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(question)
        except DBAPIError as error:
            raise NotReady("The batches' database cannot be reached.") from error
        except Unreachable as error:
            raise NotReady("The place of the batches' files cannot be reached.") from error


def options_of(asked: schemas.BatchQuery) -> Any:
    """The options of the operation that is asked for.

    Raises:
        ValidationError: A value that an option cannot have.
        BadInput: They do not go together.
    """
    kind = OPERATIONS[asked.operation]
    options = kind.Options.model_validate(
        asked.model_dump(exclude_none=True, exclude={"operation", "format"})
    )
    kind.check(options)
    if asked.format == "zip" and asked.operation != "impute":
        raise BadInput.of("format", f"jsonl, parquet or npz of {asked.operation}", "zip")
    return options


def plan(
    asked: schemas.BatchQuery,
    path: Path,
    model: Model,
    *,
    name: str,
    fingerprint: str,
    max_request: int,
) -> Spec:
    """What the batch of a file is, in parts of which each is some seconds of work.

    Raises:
        BadInput: The options, or all of the first items.
        UnknownFormat: A file that is none of those that can be read.
        TooLarge: More work than an item may be.
    """
    options = options_of(asked)
    options = options.model_copy(update={"seed": a_seed(options.seed)})
    cost = _first_cost(path, OPERATIONS[asked.operation](options, model, 0))
    if cost > max_request:
        most = f"at most {max_request} for an image, with its proposal and draws"
        raise TooLarge.of("particles", most, str(cost))
    return Spec(
        id=name,
        operation=asked.operation,
        options=options.model_dump(),
        format=asked.format,
        model=model.name,
        weights_sha256=model.card.weights_sha256,
        bytes=path.stat().st_size,
        fingerprint=fingerprint,
        chunk=max(1, min(MOST_ITEMS, CHUNK // cost)),
    )


def _first_cost(path: Path, operation: Operation) -> int:
    """What an item costs, by the first that can be read.

    Raises:
        Problem: That of the first item, if the first ones are all bad.
    """
    shape = operation.model.card.architecture.image_shape
    problems: list[Problem] = []
    for index, item in enumerate(itertools.islice(read_items(path), FIRST)):
        if item.problem is not None:
            fields = [FieldError(**field) for field in item.problem["errors"]]
            problems.append(BadInput(item.problem["detail"], *fields))
            continue
        try:
            pictures = read(item.image, item.mask, item.truth, shape, field=f"items[{index}].")
            return operation.job(0, pictures).cost
        except Problem as problem:
            problems.append(problem)
    raise problems[0]


async def _blocks(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What comes, in pieces that are worth a trip to the disk."""
    block = bytearray()
    async for piece in body:
        block += piece
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _write(block: bytes, file: Any, digest: Any) -> None:
    file.write(block)
    digest.update(block)


def _spec(status: WorkflowStatus) -> Spec:
    return Spec(**cast("Any", status.input)["args"][0])


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


STATES: dict[str, Any] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "SUCCESS": "done",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "cancelled",
}
ID = re.compile(r"[0-9a-f]{32}")
UPLOAD = "upload"
FIRST = 8
"""Items that are looked at before a batch is taken in."""
CHUNK, MOST_ITEMS = 2**18, 1024
"""The cost of a chunk and the most items of one: some seconds of work, that a crash may cost."""
BLOCK = 2**20
UPLOADING = 24.0
"""Hours that an upload may take."""
SWEEPING = 60.0
"""Seconds between looks for what is old."""
