"""Batches without a service: a file goes in, and a folder has its results.

The folder may be anywhere that fsspec reaches, as may the file. It says in spec.json what it was
begun with; what is killed goes on where it was when it is begun again with the same. The bytes are
those that the service comes to, whichever engine works and with how many processes, if models
have as many threads there.
"""

import asyncio
import hashlib
import importlib
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from service import schemas
from service.batches import Spec, options_of, plan
from service.engine import Engine
from service.errors import Conflict, Failed
from service.models import Model, Models
from service.operations import Operation, a_seed
from service.parts import PARTS_AT_ONCE, Parts
from service.settings import Settings, processors
from service.store import BEGUN, Store

__all__ = ["ENGINES", "Outcome", "run"]

Told = Callable[[int, int], None]
"""Is told how many items of how many have been worked on."""


@dataclass(frozen=True)
class Outcome:
    """Where the results are, and how many items have none."""

    results: str
    errors: str
    failed: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A batch in parts, of which some may have been worked on."""

    parts: Parts
    sizes: Sequence[int]
    settings: Settings
    workers: int | None
    """Processes of Ray's; as many as there is room for where it is None."""

    @cached_property
    def left(self) -> dict[int, int]:
        """The numbers of the parts that have no results yet, each with its first item's place."""
        firsts = itertools.accumulate([0, *self.sizes[:-1]])
        return {number: first for number, first in enumerate(firsts) if not self.parts.has(number)}

    def operation(self) -> Operation:
        """The operation by the batch's own model."""
        return self.parts.spec.operation_of(self.parts.model(device=self.settings.device))

    @property
    def threads(self) -> int:
        """Those of an engine, on which the last bits depend: one, where no setting says more."""
        return self.settings.threads if "threads" in self.settings.model_fields_set else 1

    @contextmanager
    def engine(self) -> Generator[Engine]:
        """An engine that runs for as long as this, and does what the service's would."""
        engine = Engine(
            threads=self.threads,
            max_request=self.settings.max_request,
            max_waiting=self.settings.max_waiting,
            on_lost=lambda: os.kill(os.getpid(), signal.SIGTERM),  # what is done stays
        )
        engine.start()
        try:
            yield engine
        finally:
            engine.stop(seconds=0.0)


def run(
    source: str,
    folder: str,
    asked: schemas.BatchQuery,
    *,
    settings: Settings,
    engine: str = "local",
    workers: int | None = None,
    told: Told = lambda _done, _total: None,
) -> Outcome:
    """Works on what is left of a batch, and says where its results are.

    Raises:
        Problem: The file, the options or the model, or what the folder was begun with.
        ValidationError: A value that an option cannot have.
        OSError: A place that cannot be read or written.
    """
    store = Store(folder)
    model = Models(settings.checkpoints, device=settings.device).get(asked.model or settings.model)
    with _here(source) as path:
        spec = _spec(store, folder, path, asked, model, settings)
        parts = Parts(store, spec)
        sizes = [] if store.exists(spec.results) else _split(parts, path, model)
    if sizes:
        task = Task(parts=parts, sizes=sizes, settings=settings, workers=workers)
        ended = _counted(task, told)
        if task.left:
            ENGINES[engine](task, ended)
        parts.join(len(sizes))
    parts.clear()
    store.remove(BEGUN)
    with store.open(spec.errors) as lines:
        failed = sum(1 for _ in lines)
    place = folder.rstrip("/")
    return Outcome(f"{place}/{spec.results}", f"{place}/{spec.errors}", failed)


def _spec(
    store: Store,
    folder: str,
    path: Path,
    asked: schemas.BatchQuery,
    model: Model,
    settings: Settings,
) -> Spec:
    """What the folder was begun with, or is now."""
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if store.exists(SPEC):
        with store.open(SPEC) as file:
            known = Spec(**json.load(file))
        _same(folder, known, digest, asked, model)
        return known
    if others := [name for name in store.names() if name != BEGUN]:
        found = ", ".join(others)[:80]
        raise Conflict(f"Expected {folder} to be empty, or begun before; got one with {found}.")
    asked = asked.model_copy(update={"seed": a_seed(asked.seed), "model": model.name})
    limit = settings.max_request
    spec = plan(asked, path, model, name="", fingerprint=digest, max_request=limit)
    _write_json(store, SPEC, asdict(spec))
    return spec


def _same(folder: str, known: Spec, digest: str, asked: schemas.BatchQuery, model: Model) -> None:
    """Refuses to go on with anything else than what a folder was begun with."""
    seed = known.seed if asked.seed is None else asked.seed
    options = options_of(asked.model_copy(update={"seed": seed, "model": model.name}))
    before, now = _told(known), {
        "operation": asked.operation,
        "format": asked.format,
        "weights": model.card.weights_sha256,
        "input": digest,
        **options.model_dump(),
    }  # fmt: skip
    if others := [name for name in before | now if before.get(name) != now.get(name)]:
        expected, got = (", ".join(f"{n} {w.get(n)}" for n in others) for w in (before, now))
        raise Conflict(f"Expected what {folder} was begun with, {expected}; got {got}.")


def _told(spec: Spec) -> dict[str, Any]:
    named = {"operation": spec.operation, "format": spec.format}
    return {**named, "weights": spec.weights_sha256, "input": spec.fingerprint, **spec.options}


def _split(parts: Parts, path: Path, model: Model) -> list[int]:
    """How many items each part has; they are written, and so is the model."""
    known = f"{parts.spec.work}/{SIZES}"
    if parts.store.exists(known):
        with parts.store.open(known) as file:
            return json.load(file)
    with parts.store.writing(parts.spec.checkpoint) as folder:
        model.write(folder)
    sizes = parts.split(path)
    _write_json(parts.store, known, sizes)
    return sizes


def _counted(task: Task, told: Told) -> Callable[[int], None]:
    """Tells how many items have been worked on, whenever a part of some number has been."""
    total = sum(task.sizes)
    done = total - sum(task.sizes[number] for number in task.left)
    told(done, total)

    def ended(number: int) -> None:
        nonlocal done
        done += task.sizes[number]
        told(done, total)

    return ended


def _local(task: Task, ended: Callable[[int], None]) -> None:
    """Works in this process, with as many engines as there are processors for."""
    most = max(1, int(processors() / task.threads))
    with ExitStack() as stack:
        engines = [stack.enter_context(task.engine()) for _ in range(min(most, len(task.left)))]
        asyncio.run(_all(task, engines, ended))


async def _all(task: Task, engines: Sequence[Engine], ended: Callable[[int], None]) -> None:
    operation = await asyncio.to_thread(task.operation)
    waiting = iter(task.left.items())

    async def one_by_one(engine: Engine) -> None:
        for number, first in waiting:
            await task.parts.work(number, first, operation, engine)
            ended(number)

    await asyncio.gather(*(one_by_one(each) for each in engines for _ in range(PARTS_AT_ONCE)))


def _ray(task: Task, ended: Callable[[int], None]) -> None:
    """Works in processes of Ray's, on one machine or on many that see the same folder."""
    with _connected() as ray:
        gpu = task.settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1
        there, each = ("GPU", 1) if gpu else ("CPU", task.threads)
        room = max(1, int(ray.cluster_resources().get(there, 1) / each))
        workers = min(task.workers or room, len(task.left))
        todo = [{"number": number, "first": first} for number, first in task.left.items()]
        done = ray.data.from_items(todo, override_num_blocks=min(len(todo), BLOCKS)).map_batches(
            Actor,
            fn_constructor_kwargs={"task": task},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=task.threads,
            num_gpus=1 if gpu else 0,
        )
        try:
            for row in done.iter_rows():
                ended(int(row["number"]))
        except ray.exceptions.RayError as error:
            raise Failed(f"Ray could not do it: {error}") from error


@contextmanager
def _connected() -> Generator[Any]:
    """Ray, with the cluster that RAY_ADDRESS names or one of its own for as long as this."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")
    importlib.import_module("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield ray
    finally:
        if begun:
            ray.shutdown()


class Actor:
    """One process of Ray's: a model, and an engine."""

    def __init__(self, task: Task) -> None:
        self._task, self._running = task, task.engine()
        self._engine = self._running.__enter__()
        self._operation = task.operation()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Works on the parts of these numbers."""
        for number, first in zip(batch["number"], batch["first"], strict=True):
            work = self._task.parts.work(int(number), int(first), self._operation, self._engine)
            asyncio.run(work)
        return {"number": batch["number"]}


ENGINES: dict[str, Callable[[Task, Callable[[int], None]], None]] = {
    "local": _local,
    "ray": _ray,
}


@contextmanager
def _here(address: str) -> Generator[Path]:
    """A file as it is on this machine, for as long as this."""
    found: tuple[Any, str] = fsspec.url_to_fs(address)
    files, name = found
    if isinstance(files, LocalFileSystem):
        yield Path(name)
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        files.get_file(name, str(path))
        yield path


def _write_json(store: Store, name: str, value: Any) -> None:
    with store.writing(name) as path:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


SPEC, SIZES = "spec.json", "sizes.json"
BLOCKS = 1000
"""Pieces of work that Ray gives out, at most."""
