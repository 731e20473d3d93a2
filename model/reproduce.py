"""Training a table, cell by cell, in slices that may stop at any time.

A cell is a run's folder, trained by `miss-iwem train` in a process of its own, a slice of minutes
at a time; then its checkpoint is scored, and the card and the metrics are copied to the results.
What is done stays done: whoever calls again goes on from there, also with another budget, another
number of processes, or on another machine to which the folder was moved.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from model import checkpoint
from model.checkpoint import CARD, CheckpointError
from model.curves import SUFFIX, variances
from model.run import CHECKPOINT, METRICS
from model.tables import Cell, page
from model.train import MORE_TO_DO

__all__ = ["reproduce"]

SLICE = 10.0
"""Minutes of training after which a process ends, and the next goes on."""
Call = Callable[[Sequence[str]], int]
"""Runs a command of `miss-iwem`, given its words, and returns its exit status."""


def reproduce(
    cells: Sequence[Cell],
    call: Call,
    *,
    runs: Path,
    docs: Path,
    minutes: float,
    jobs: int,
    threads: int,
    console: Console,
) -> bool:
    """Trains and scores what is not done yet, within the minutes; whether all is done.

    The page of results and its picture are written in any case.
    """
    until = time.monotonic() + 60 * minutes
    results = docs / "results"
    results.mkdir(parents=True, exist_ok=True)

    def work(cell: Cell) -> bool:
        place = Place(runs / cell.name, results / f"{cell.name}.json")
        said = _worked(cell, place, until, lambda words: call([*words, f"--threads={threads}"]))
        console.print(f"{cell.name}: {said}")
        return said in (DONE, DONE_BEFORE)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(work, cells))
    (docs / "results.md").write_text(page(results))
    variances(results, docs / "variances.png")
    return all(done)


DONE, DONE_BEFORE = "done", "done before"


@dataclass(frozen=True)
class Place:
    """Where a cell is trained, and where its card goes once it is scored."""

    run: Path
    result: Path


def _worked(cell: Cell, place: Place, until: float, call: Call) -> str:
    """What became of a cell, in a few words."""
    if place.result.exists():
        return DONE_BEFORE
    while (left := (until - time.monotonic()) / 60) > 0:
        minutes = min(SLICE, left)
        status = call(
            ["train", *cell.words, f"--out={place.run}", "--resume", f"--minutes={minutes}"]
        )
        if status == 0:
            return _scored(place, call)
        if status != MORE_TO_DO:
            return f"training ended with status {status}"
    return "the time is over"


def _scored(place: Place, call: Call) -> str:
    """The card is a result only once both scores are in it."""
    folder = place.run / CHECKPOINT
    if not _has_scores(folder):
        status = call(["evaluate", str(folder), "--scores=raw,tight"])
        if status != 0:
            return f"scoring ended with status {status}"
    shutil.copyfile(place.run / METRICS, place.result.with_suffix(SUFFIX))
    part = place.result.with_suffix(".part")
    shutil.copyfile(folder / CARD, part)
    part.replace(place.result)
    return DONE


def _has_scores(folder: Path) -> bool:
    try:
        return {"raw", "tight"} <= checkpoint.read_card(folder).results.keys()
    except CheckpointError:
        return False
