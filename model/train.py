"""Training: incomplete images and a recipe become a checkpoint, in the folder of a run."""

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.checkpoint import Card
from model.data import DataError
from model.masks import MechanismError
from model.recipe import (
    Recipe,
    RecipeError,
    differences,
    parser,
    read_recipe,
    stored_recipe,
)
from model.run import CHECKPOINT, LOCK, RECIPE, Diverged, Metrics, Run
from model.stages import finish
from model.step import flushed
from model.team import Team
from model.together import Together

__all__ = ["MORE_TO_DO", "Interrupted", "main", "on_stop", "train", "train_seeds"]


MORE_TO_DO = 75
"""The exit status of a run whose minutes are over: EX_TEMPFAIL, come again."""


class Interrupted(RuntimeError):
    """The run has more to do, and has saved its state; with the exit status that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def train(
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    device: str = "auto",
    minutes: float = math.inf,
    console: Console | None = None,
) -> Card:
    """Trains until validation stops improving; returns the best model's card.

    Raises:
        RecipeError: The folder holds a run of another recipe, or one that `resume` was not
            asked for, or another process works on it; or this machine lacks the device.
        DataError: There are no such data, or nothing of them is observed.
        Diverged: The bound became NaN or infinite; the last good state is kept.
        Interrupted: SIGINT or SIGTERM came, or the minutes are over; the state is saved.
    """
    with _limit(minutes) as limit, _arithmetic(recipe.precision), ExitStack() as held:
        team = Team.joined()
        _refuse_another(folder, recipe, resume=resume)
        team.wait()
        run = Run(folder, recipe, device=device, team=team)
        if team.leads:
            held.enter_context(_alone(folder))
        run.begin()
        show = console or Console(stderr=True)

        with _curves(run) as draw, _progress(show, run) as progress:
            for metrics in run.rest():
                progress(metrics)
                draw(metrics)
                stop, due = team.any(limit.over(run), run.due)
                if stop or due:
                    run.save()
                if stop:
                    raise limit.stopped(run)
        _polish(run, limit, show)
        team.wait()
        return run.up_to_date_card()


def train_seeds(
    folder: Path,
    recipe: Recipe,
    seeds: int,
    *,
    resume: bool = False,
    device: str = "auto",
    minutes: float = math.inf,
    console: Console | None = None,
) -> list[Card]:
    """Trains the recipe with so many seeds at once, each in a folder of its own, as one stack.

    Their weights are what each would become alone, but for rounding.

    Raises:
        RecipeError, DataError, Diverged, Interrupted: As of `train`.
    """
    if recipe.optimizer != "adam":
        raise RecipeError(
            f"Expected optimizer adam with several seeds at once; got {recipe.optimizer}."
        )
    if "gated-conv" in (recipe.architecture.encoder, recipe.architecture.decoder):
        raise RecipeError("Expected networks mlp with several seeds at once; got gated-conv.")
    show, runs = console or Console(stderr=True), list[Run]()
    together: Together | None = None
    with _limit(minutes) as limit, _arithmetic(recipe.precision), ExitStack() as held:
        for seed in range(recipe.seed, recipe.seed + seeds):
            place, each = folder / f"seed-{seed}", replace(recipe, seed=seed)
            _refuse_another(place, each, resume=resume)
            runs.append(Run(place, each, device=device))
            held.enter_context(_alone(place))
            runs[-1].begin()
        while left := [run for run in runs if not run.finished]:
            least = min((run.state.step, run.state.validated) for run in left)
            behind = [run for run in left if (run.state.step, run.state.validated) == least]
            if together is None or together.runs != behind:
                together = Together(behind)
            _together(together, limit)
            for run in behind:
                metrics = finish(run.end_epoch())
                show.print(f"seed {run.recipe.seed}, {_said(metrics, run)}")
        for run in runs:
            _polish(run, limit, show)
        return [run.up_to_date_card() for run in runs]


def _together(together: Together, limit: "_Limit") -> None:
    """Takes the runs, which are at the same step, to the end of their epoch."""
    runs, lead = together.runs, together.runs[0]
    for _ in together.rest():
        stop = limit.over(lead)
        if stop or lead.due:
            together.scatter()
            for run in runs:
                run.save()
        if stop:
            raise limit.stopped(lead)
    together.scatter()


def _polish(run: Run, limit: "_Limit", show: Console) -> None:
    for taken in run.polish():
        stop = limit.over(run)
        if stop or run.due:
            run.save()
            show.print(f"polish {taken}/{run.recipe.polish_steps}")
        if stop:
            raise limit.stopped(run)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the words of a command line say; returns the exit status.

    0 is done, 1 diverged, 2 a recipe or data that cannot be, 75 the minutes are over and there is
    more to do, 130 and 143 stopped by a signal.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = vars(parser().parse_args(words))
    led = os.environ.get("RANK", "0") != "0"
    console = Console(stderr=True, quiet=led, highlight=False, markup=False, soft_wrap=True)
    try:
        folders, cards = _follow(console, **options)
    except (RecipeError, DataError, MechanismError) as error:
        console.print(str(error))
        return 2
    except Diverged as error:
        console.print(str(error))
        return 1
    except Interrupted as stop:
        again = words if options["resume"] else [*words, "--resume"]
        console.print(f"{stop} Go on with: miss-iwem train {shlex.join(again)}")
        return stop.status
    finally:
        Team.disband()
    for folder, card in zip(folders, cards, strict=True):
        console.print(
            f"Done: {folder / CHECKPOINT} is of epoch {card.training['best_epoch'] + 1}, "
            f"with a validation bound of {card.training['validation_bound']:.2f}."
        )
    return 0


def _follow(
    console: Console,
    *,
    recipe: str | None,
    out: Path | None,
    resume: bool,
    device: str,
    threads: int | None,
    minutes: float,
    seeds: int,
    **changes: Any,
) -> tuple[list[Path], list[Card]]:
    for name, count in (("threads", threads), ("seeds", seeds)):
        if count is not None and count < 1:
            raise RecipeError(f"Expected {name} of at least 1; got {count}.")
    if threads is not None:
        torch.set_num_threads(threads)
    if recipe is None and resume and out and (out / RECIPE).exists():
        asked = stored_recipe(out / RECIPE, **changes)
    elif recipe is None and changes["data"] is None:
        raise RecipeError("Expected a RECIPE, or --data, or --resume and the --out of a run.")
    else:
        asked = read_recipe(recipe, **changes)
    name = Path(recipe).stem if recipe else f"{Path(asked.data).resolve().stem}-{asked.objective}"
    folder = out or Path("runs") / name
    if seeds > 1:
        cards = train_seeds(
            folder, asked, seeds, resume=resume, device=device, minutes=minutes, console=console
        )
        return [folder / f"seed-{asked.seed + index}" for index in range(seeds)], cards
    card = train(folder, asked, resume=resume, device=device, minutes=minutes, console=console)
    return [folder], [card]


def _refuse_another(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"Expected a folder for the run; got the file {folder}.")
    if not (folder / RECIPE).exists():
        return
    if not resume:
        raise RecipeError(
            f"Expected a folder without a run; got {folder}. "
            "Add --resume to go on with it, or name another --out."
        )
    if changed := differences(stored_recipe(folder / RECIPE), recipe):
        raise RecipeError(f"The run in {folder} has another recipe. {changed}")


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Keeps other processes from the run in a folder; two would write each epoch twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise RecipeError(
            f"Expected a run that nobody works on; another process trains the one in {folder}."
        ) from None
    except OSError as error:
        raise RecipeError(f"Expected a folder for the run; got {folder}: {error}.") from error
    with lock:
        yield


@dataclass(frozen=True)
class _Limit:
    """What ends a training before it is done."""

    received: Sequence[int]
    """The numbers of the signals that have asked the process to stop."""
    until: float

    def over(self, run: Run) -> bool:
        """Whether to stop here; a validation, which would begin anew, only a signal breaks off."""
        return bool(self.received) or (time.monotonic() >= self.until and not run.validating)

    def stopped(self, run: Run) -> Interrupted:
        """What to raise once the run is saved."""
        status = 128 + self.received[0] if self.received else MORE_TO_DO
        return Interrupted(f"Stopped after step {run.state.step}.", status)


@contextmanager
def _limit(minutes: float) -> Generator[_Limit]:
    until, received = time.monotonic() + 60 * minutes, list[int]()
    with on_stop(received.append):
        yield _Limit(received, until)


@contextmanager
def on_stop(do: Callable[[int], object]) -> Generator[None]:
    """Has this done, given its number, when a signal asks the process to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {s: signal.signal(s, lambda number, _: do(number)) for s in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _arithmetic(precision: str) -> Generator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
    try:
        with flushed():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _progress(console: Console, run: Run) -> Generator[Callable[[Metrics | None], None]]:
    """A bar over the steps where there is a terminal, and a line an epoch."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    first, started = run.state.step, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=run.steps, epoch=1, rate="")

        def show(metrics: Metrics | None) -> None:
            step, epoch = run.state.step, run.state.validated + 1
            rate = (step - first) / (time.monotonic() - started)
            progress.update(task, completed=step, epoch=epoch, rate=f"{rate:.1f} steps/s")
            if metrics:
                left = timedelta(seconds=round((run.steps - step) / rate)) if rate else "?"
                console.print(f"{_said(metrics, run)}, {rate:.1f} steps/s, at most {left} left")

        yield show


def _said(metrics: Metrics, run: Run) -> str:
    return (
        f"epoch {metrics.epoch + 1}/{run.recipe.epochs}: bound {metrics.train_bound:.2f}, "
        f"validation {metrics.validation_bound:.2f} (best in epoch {metrics.best_epoch + 1})"
    )


@contextmanager
def _curves(run: Run) -> Generator[Callable[[Metrics | None], None]]:
    """Writes epochs to TensorBoard, where that is installed, in place of what was there."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError:
        yield lambda _metrics: None
        return
    if not run.team.leads:
        yield lambda _metrics: None
        return
    with SummaryWriter(run.folder / "tensorboard", purge_step=0) as writer:

        def draw(metrics: Metrics | None) -> None:
            if metrics:
                for name in ("train_bound", "validation_bound", "alpha"):
                    writer.add_scalar(name, getattr(metrics, name), metrics.step)
                writer.flush()

        for past in run.history():
            draw(past)
        yield draw


if __name__ == "__main__":
    sys.exit(main())
