"""The worker: does the work of batches, to its end whatever happens.

A batch is a durable workflow of DBOS's: it splits its file into parts, has a chunk of work done
for each, and joins what came of them. Each of these is a step that leaves a whole file or none,
and whose end is recorded in the database. Whatever is killed, what had no end is begun again,
here or by another worker, and comes to the same bytes. The database is SQLite for the one worker
of a service, or PostgreSQL for any number; a worker whose heartbeat stops is taken for dead, and
its work is given to the others. If it is not dead, the same is done twice, to the same end.
"""

import asyncio
import itertools
import logging
import socket
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, WorkflowStatusString
from dbos import WorkflowHandleAsync as Handle
from sqlalchemy import event

from service.batches import APPLICATION, BATCH, BATCHES, PROGRESS, TROUBLE, Spec
from service.engine import Engine
from service.errors import Failed
from service.heartbeats import Heartbeats
from service.models import Model
from service.parts import PARTS_AT_ONCE, Parts
from service.store import Store, Unreachable

__all__ = ["Worker", "unresolved"]

log = logging.getLogger(__name__)
T = TypeVar("T")
CHUNK, CHUNKS = "chunk", "chunks"


class Worker:
    """Does what is to be done of all batches in a database, one process of perhaps many."""

    def __init__(
        self, store: Store, database: str, engine: Engine, *, device: str = "auto"
    ) -> None:
        self._store, self._database, self._engine = store, database, engine
        self._device = device
        self._name, self._heartbeats = ALONE, None
        if not database.startswith("sqlite"):
            self._name = f"{socket.gethostname()}-{uuid.uuid4().hex}"
            self._heartbeats = Heartbeats(
                database, self._name, alive=lambda: engine.ready, take_over=_take_over
            )
        self._models: OrderedDict[str, Model] = OrderedDict()

    def prepare(self) -> None:
        """Makes the database what workers need, and does no work."""
        DBOS.migrate(self._database)

    def start(self) -> None:
        """Begins what waits, and again what this worker had begun before.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached.
        """
        if self._heartbeats is not None:
            self._heartbeats.prepare()
        if not event.contains(sa.Engine, "handle_error", unresolved):
            event.listen(sa.Engine, "handle_error", unresolved)
        DBOS(
            config=DBOSConfig(
                name=APPLICATION,
                system_database_url=self._database,
                serializer=DBOSPortableJSONSerializer(),
                application_version=VERSION,
                executor_id=self._name,
                sys_db_pool_size=CONNECTIONS,
                log_level="ERROR",
            )
        )

        async def batch(told: dict[str, Any]) -> dict[str, int]:
            return await self._batch(Spec(**told))

        async def chunk(told: dict[str, Any], number: int, first: int) -> dict[str, Any]:
            return await self._step(Spec(**told), CHUNK, self._chunk, number, first)

        # killed a hundred times is not too often, where it is gone on with
        DBOS.workflow(name=BATCH, max_recovery_attempts=None)(batch)
        DBOS.workflow(name=CHUNK, max_recovery_attempts=None)(chunk)
        DBOS.launch()
        DBOS.register_queue(
            BATCHES, worker_concurrency=BATCHES_AT_ONCE, polling_interval_sec=POLLING
        )
        DBOS.register_queue(
            CHUNKS,
            worker_concurrency=PARTS_AT_ONCE,
            partition_worker_concurrency=PARTS_AT_ONCE,
            polling_interval_sec=POLLING,
        )
        if self._heartbeats is not None:
            self._heartbeats.start()

    def stop(self) -> None:
        """Leaves what was begun to who begins it again."""
        DBOS.destroy(destroy_registry=True, workflow_completion_timeout_sec=SETTLING)
        if self._heartbeats is not None:
            self._heartbeats.stop()

    async def _batch(self, spec: Spec) -> dict[str, int]:
        split = await self._step(spec, "split", self._split)
        sizes: list[int] = split["sizes"]
        progress = {
            "total": sum(sizes),
            "done": 0,
            "failed": 0,
            "since": split["at"],
            "at": split["at"],
        }
        await DBOS.set_event_async(PROGRESS, progress)
        begun: deque[Handle[dict[str, Any]]] = deque()
        for number, first in enumerate(itertools.accumulate([0, *sizes[:-1]])):
            if len(begun) == WINDOW:
                progress = await self._ended(begun.popleft(), progress)
            begun.append(
                await DBOS.enqueue_workflow_with_options_async(
                    {
                        "workflow_name": CHUNK,
                        "queue_name": CHUNKS,
                        "workflow_id": f"{spec.id}-{number}",
                        "queue_partition_key": spec.id,
                    },
                    vars(spec),
                    number,
                    first,
                )
            )
        while begun:
            progress = await self._ended(begun.popleft(), progress)
        await self._step(spec, "join", self._join, len(sizes))
        await self._step(spec, "clear", self._clear)
        return {"done": progress["done"], "failed": progress["failed"]}

    @staticmethod
    async def _ended(chunk: Handle[dict[str, Any]], progress: dict[str, Any]) -> dict[str, Any]:
        """The progress after the end of this chunk too."""
        came = await chunk.get_result(polling_interval_sec=POLLING)
        for name in ("done", "failed"):
            progress = {**progress, name: progress[name] + came[name]}
        progress["at"] = max(progress["at"], came["at"])
        await DBOS.set_event_async(PROGRESS, progress)
        return progress

    async def _step(
        self, spec: Spec, name: str, work: Callable[..., Awaitable[T]], *arguments: Any
    ) -> T:
        """A step of the batch, again and again while the disk or the network fails."""

        async def lasting() -> T:
            for pause in itertools.chain((1, 2, 4, 8, 16), itertools.repeat(30)):
                try:
                    done = await work(spec, *arguments)
                except FileNotFoundError as error:
                    raise Failed(f"The batch's files are gone: {error}.") from error
                except (OSError, Unreachable) as error:
                    log.warning("Batch %s, %s: %s", spec.id, name, error)
                    await _tell(spec.id, f"It is tried again: {name} failed ({error}).")
                    await asyncio.sleep(pause)
                else:
                    if pause > 1:
                        await _tell(spec.id, None)
                    return done
            raise AssertionError

        return await DBOS.run_step_async({"name": name}, lasting)

    async def _split(self, spec: Spec) -> dict[str, Any]:
        """Writes the items in parts, and says how many each has."""

        def work() -> list[int]:
            with self._store.here(spec.upload) as path, self._attempt(spec):
                return self._parts(spec).split(path)

        return {"sizes": await asyncio.to_thread(work), "at": time.time()}

    @contextmanager
    def _attempt(self, spec: Spec) -> Generator[None]:
        """What a file makes of a process is not tried for ever: it may take all memory there is.

        Raises:
            Failed: So many processes have not come to the end of it.
        """
        place = f"{spec.work}/attempts"
        if len(self._store.names(place)) >= MOST_ATTEMPTS:
            raise Failed(
                f"The file could not be gone through: {MOST_ATTEMPTS} times the process ended, "
                "perhaps for want of memory."
            )
        mine = f"{place}/{uuid.uuid4().hex}"
        with self._store.writing(mine) as path:
            path.touch()
        try:
            yield
        finally:
            self._store.remove(mine)

    async def _chunk(self, spec: Spec, number: int, first: int) -> dict[str, Any]:
        """Works on a part, and says how many of its items have results."""
        operation = spec.operation_of(await asyncio.to_thread(self._model, spec))
        work = self._parts(spec).work(number, first, operation, self._engine)
        done = await _while_wanted(spec.id, work)
        return {"done": len(done.rows), "failed": len(done.problems), "at": time.time()}

    async def _join(self, spec: Spec, count: int) -> None:
        """Makes one file of all results, and one of all errors."""
        await asyncio.to_thread(self._parts(spec).join, count)

    async def _clear(self, spec: Spec) -> None:
        """Removes what only the work needed."""
        await asyncio.to_thread(self._parts(spec).clear)

    def _parts(self, spec: Spec) -> Parts:
        return Parts(self._store, spec)

    def _model(self, spec: Spec) -> Model:
        """The batch's own model, which other batches may have too."""
        model = self._models.get(spec.weights_sha256)
        if model is None:
            model = self._parts(spec).model(device=self._device)
            self._models[spec.weights_sha256] = model
            while len(self._models) > MOST_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(spec.weights_sha256)
        return model


def _take_over(name: str) -> None:
    """Lets any worker do again what this one had begun."""
    for workflow, queue in ((BATCH, BATCHES), (CHUNK, CHUNKS)):
        begun = DBOS.list_workflows(
            executor_id=name, status=PENDING, name=workflow, load_input=False, load_output=False
        )
        if begun:
            DBOS.resume_workflows([each.workflow_id for each in begun], queue_name=queue)


async def _while_wanted(name: str, work: Coroutine[Any, Any, T]) -> T:
    """The result of work on a batch, which ends where the batch has ended or is deleted.

    A workflow that is told to end notices only at its next step, and never that it is deleted.
    """
    task = asyncio.create_task(work)
    try:
        while True:
            batch = await DBOS.get_workflow_status_async(name)
            if batch is None or batch.status not in (PENDING, ENQUEUED):
                raise Failed("The batch has ended.")
            await asyncio.wait({task}, timeout=WATCHING)
            if task.done():
                return task.result()
    finally:
        task.cancel()


def unresolved(context: sa.ExceptionContext) -> None:
    """A database without an address is one that is away, and is waited for.

    DBOS takes it for a mistake otherwise, and leaves what it was doing; but a container that is
    stopped has no address.
    """
    if "failed to resolve host" in str(context.original_exception):
        context.is_disconnect = True


async def _tell(name: str, trouble: str | None) -> None:
    """Says in the batch's state what it waits for."""
    await DBOS.update_workflow_attributes_async(name, {TROUBLE: trouble}, merge=True)


VERSION = "1"
"""Of the workflows: what another version has begun is not gone on with."""
ALONE = "alone"
"""The name of a worker that no other can be beside: the next one begins again what it had."""
PENDING, ENQUEUED = WorkflowStatusString.PENDING.value, WorkflowStatusString.ENQUEUED.value
SETTLING = 1
"""Seconds in which the threads that begin work end before what they begin it on."""
WATCHING = 1.0
"""Seconds after which it is looked whether a batch is still wanted."""
POLLING = 0.25
"""Seconds after which the database is asked again."""
BATCHES_AT_ONCE = 16
"""Of a worker, most of which wait for their chunks."""
CONNECTIONS = 5
"""To the database, of a worker."""
MOST_ATTEMPTS = 10
"""To go through a file."""
WINDOW = 256
"""Chunks of a batch that wait or are worked on; of other batches there are as many."""
MOST_MODELS = 4
