"""A batch in parts: files of its items, and files of what came of them.

Whoever works on batches does it by these, and so a batch comes to the same bytes everywhere.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from service.batches import Spec
from service.chunks import Chunk, work_on
from service.engine import Engine
from service.items import Item, read_items, read_part, write_part
from service.models import Model, Models
from service.operations import Operation
from service.results import FORMATS
from service.store import Store

__all__ = ["PARTS_AT_ONCE", "Parts"]


@dataclass(frozen=True)
class Parts:
    """The files of a batch while it is worked on."""

    store: Store
    spec: Spec

    def split(self, path: Path) -> list[int]:
        """How many items each part has, which are written."""
        sizes: list[int] = []
        for number, items in enumerate(_together(read_items(path), self.spec.chunk)):
            with self.store.writing(self.spec.part(ITEMS, number)) as part:
                write_part(items, part)
            sizes.append(len(items))
        return sizes

    def has(self, number: int) -> bool:
        """Whether a part has been worked on."""
        return self.store.exists(self.spec.part(RESULTS, number))

    async def work(self, number: int, first: int, operation: Operation, engine: Engine) -> Chunk:
        """What came of a part, which is written; its first item has this place in the batch."""
        items = await asyncio.to_thread(self._items, number)
        done = await work_on(items, first, operation, engine, self.spec.form)
        await asyncio.to_thread(self._keep, number, done)
        return done

    def join(self, count: int) -> None:
        """Makes one file of all results, and one of all errors."""
        with self.store.writing(self.spec.errors) as path:
            FORMATS["jsonl"].join(lambda: self._opened(ERRORS, count), path)
        with self.store.writing(self.spec.results) as path:
            self.spec.form.join(lambda: self._opened(RESULTS, count), path)

    def clear(self) -> None:
        """Removes what only the work needed."""
        self.store.remove(self.spec.work)

    def model(self, *, device: str) -> Model:
        """The batch's own model."""
        with self.store.here(self.spec.checkpoint) as folder:
            return Models(folder.parent, device=device).get(folder.name)

    def _items(self, number: int) -> list[Item]:
        with self.store.open(self.spec.part(ITEMS, number)) as file:
            return read_part(file)

    def _keep(self, number: int, done: Chunk) -> None:
        """Writes what came of a part; its results are last, for they say that it is done."""
        with self.store.writing(self.spec.part(ERRORS, number)) as path:
            FORMATS["jsonl"].write(done.problems, path)
        with self.store.writing(self.spec.part(RESULTS, number)) as path:
            self.spec.form.write(done.rows, path)

    def _opened(self, kind: str, count: int) -> Iterator[IO[bytes]]:
        for number in range(count):
            with self.store.open(self.spec.part(kind, number)) as file:
                yield file


def _together(items: Iterator[Item], most: int) -> Iterator[list[Item]]:
    """The items in turn, so many together, or fewer where these are large."""
    part: list[Item] = []
    size = 0
    for item in items:
        length = sum(len(each or b"") for each in (item.image, item.mask, item.truth))
        if part and (len(part) == most or size + length > PART_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part


ITEMS, RESULTS, ERRORS = "items", "results", "errors"
PART_BYTES = 32 * 2**20
PARTS_AT_ONCE = 2
"""Of an engine: one is read and written while the other is worked on."""
