"""The work on some items of a batch: rows of results, and the problems of those that have none."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine import Engine
from service.errors import NotReady, Overloaded, Problem
from service.items import Item
from service.operations import Operation, read
from service.results import Format, Row

__all__ = ["Chunk", "work_on"]

AT_ONCE = 64
"""Items that the engine has at a time; it works on a few of them together."""
PAUSE = 0.5
"""Seconds after which an engine that had no room is asked again."""


@dataclass(frozen=True)
class Chunk:
    """What came of some items."""

    rows: list[Row]
    problems: list[Row]
    """One for each item that has no row: its index, its id and a problem document."""


async def work_on(
    items: Sequence[Item], first: int, operation: Operation, engine: Engine, form: Format
) -> Chunk:
    """The results of items of which the first has this place in the batch.

    They are those of a request for the item alone with the seed that its row has.
    """
    places = asyncio.Semaphore(AT_ONCE)
    encoding: str = getattr(operation.options, "encoding", "")

    def encode(pixels: np.ndarray) -> Any:
        return form.encode(pixels, encoding)

    async def one(index: int, item: Item) -> tuple[Row | None, dict[str, Any] | None]:
        if item.problem is not None:
            return None, item.problem
        async with places:
            try:
                return await _row(index, item, operation, engine, encode), None
            except Problem as problem:
                return None, problem.document()

    done = await asyncio.gather(*(one(index, item) for index, item in enumerate(items, first)))
    return Chunk(
        [row for row, _ in done if row is not None],
        [
            {"index": index, "id": item.name, "problem": problem}
            for index, (item, (_, problem)) in enumerate(zip(items, done, strict=True), first)
            if problem is not None
        ],
    )


async def _row(index: int, item: Item, operation: Any, engine: Engine, encode: Any) -> Row:
    shape = operation.model.card.architecture.image_shape
    pictures = read(item.image, item.mask, item.truth, shape)
    job = operation.job(index, pictures)
    while True:
        try:
            answers = await engine.submit([job], background=True)
            break
        except (Overloaded, NotReady):  # what stops leaves the item to whoever begins again
            await asyncio.sleep(PAUSE)
    result = operation.result(index, item.name, pictures, answers.results[0], encode)
    return {"index": index, **result.model_dump()}
