"""The commands of batches, `miss-iwem batch`: of a service's, and of those that need none."""

import functools
import importlib.util
import inspect
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from service import client, errors, offline
from service.client import Batch, Client
from service.schemas import BatchQuery, ImputeOptions
from service.settings import Settings

__all__ = ["batch_app", "fail", "read_settings"]

batch_app = typer.Typer(help="Files of many images.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="ID", help="The batch.")]
Server = Annotated[
    str, typer.Option(envvar="MISS_IWEM_SERVER", help="The address of the service.")
]
LOCAL = "http://127.0.0.1:8000"


def _asking(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of a query, which it gets as `asked`."""
    own = [each for each in inspect.signature(command).parameters.values() if each.name != "asked"]

    @functools.wraps(command)
    def asks(**given: Any) -> None:
        told = {name: given.pop(name) for name in BatchQuery.model_fields}
        chosen = {name: value for name, value in told.items() if value is not None}
        command(asked=BatchQuery(**chosen), **given)

    vars(asks)["__signature__"] = inspect.Signature([*own, *map(_option, BatchQuery.model_fields)])
    return asks


def _option(name: str) -> inspect.Parameter:
    field, same = BatchQuery.model_fields[name], ImputeOptions.model_fields.get(name)
    told = typer.Option(help=(same and same.description) or field.description)
    default = inspect.Parameter.empty if field.is_required() else field.default
    kind = Annotated[field.rebuild_annotation(), told]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
    )


@batch_app.command()
@_asking
def submit(
    file: Annotated[Path, typer.Argument(help="Images, as docs/api.md has them.")],
    *,
    asked: BatchQuery,
    wait: Annotated[bool, typer.Option(help="Until it ends.")] = False,
    server: Server = LOCAL,
) -> None:
    """Hand a file in to a service; the batch's id is printed."""
    with _service(server) as service:
        batch = service.submit(file, **asked.model_dump(exclude_none=True))
        typer.echo(batch.id)
        if wait:
            _watch(service.watch(batch.id))


@batch_app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="[ID]", help="All the latest.")] = None,
    *,
    watch: Annotated[bool, typer.Option(help="Until it ends.")] = False,
    server: Server = LOCAL,
) -> None:
    """Say how a batch is, or how the latest are."""
    if name is None and watch:
        fail("Expected the id of the batch that is to be watched; got none.")
    with _service(server) as service:
        if name is not None and watch:
            _watch(service.watch(name))
        else:
            found = service.states() if name is None else [service.state(name)]
            Console().print(_table(found))


@batch_app.command()
def results(
    name: Name,
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    *,
    errors: Annotated[
        Path | None, typer.Option(help="A file for the lines of items that have no result.")
    ] = None,
    server: Server = LOCAL,
) -> None:
    """Get the results of a batch that is done."""
    with _service(server) as service:
        service.results(name, out)
        if errors is not None:
            service.errors(name, errors)


@batch_app.command()
def cancel(name: Name, *, server: Server = LOCAL) -> None:
    """Have no more of a batch done."""
    with _service(server) as service:
        typer.echo(service.cancel(name).state)


@batch_app.command()
def delete(name: Name, *, server: Server = LOCAL) -> None:
    """Have a batch that has ended forgotten, with its results."""
    with _service(server) as service:
        service.delete(name)


@batch_app.command()
@_asking
def run(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A file, or its address.")],
    out: Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder, or its address.")],
    *,
    asked: BatchQuery,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This process, or several of Ray's.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of Ray's; all that there is room for.")
    ] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of the checkpoints.")] = None,
) -> None:
    """Work on a file without a service; what was stopped goes on where it was."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        fail('Expected Ray; got none. Run: pip install ".[ray]"')
    if engine == "local" and workers is not None:
        fail(f"Expected workers with --engine ray only; got {workers}.")
    settings = read_settings(checkpoints=checkpoints)
    try:
        with _telling() as told:
            done = offline.run(
                source, out, asked, settings=settings, engine=engine, workers=workers, told=told
            )
    except (errors.Problem, OSError) as error:
        fail(str(error))
    except ValidationError as error:
        fail(" ".join(f"--{each['loc'][0]}: {each['msg']}." for each in error.errors()))
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(f"Done: {done.results}")
    if done.failed:
        typer.echo(f"{done.failed} items have no result, and {done.errors} says why.", err=True)


@contextmanager
def _service(address: str) -> Generator[Client]:
    """A client, whose failures end the command with their sentences."""
    try:
        with Client(address) as service:
            yield service
    except (client.Problem, client.Unreachable, OSError) as failure:
        fail(str(failure))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _table(batches: Iterable[Batch]) -> Table:
    table = Table(
        Column("id", no_wrap=True, min_width=32),
        "state",
        "operation",
        "model",
        "items",
        "failed",
        "created",
        "problem",
    )
    for each in batches:
        table.add_row(
            each.id,
            each.state,
            each.operation,
            each.model,
            f"{each.done + each.failed}/{'?' if each.total is None else each.total}",
            str(each.failed),
            f"{each.created_at:%Y-%m-%d %H:%M}",
            each.problem or "",
        )
    return table


def _watch(states: Iterable[Batch]) -> None:
    """Shows how far a batch is until it ends; one that did not succeed ends the command with 1."""
    batch = None
    with _bar() as bar:
        shown = bar.add_task("", total=None, told="")
        for batch in states:
            bar.update(
                shown,
                description=batch.state,
                completed=batch.done + batch.failed,
                total=batch.total,
                told=_told(batch.rate, batch.eta),
            )
    if batch is not None:
        typer.echo(f"{batch.state}: {batch.done} done, {batch.failed} failed", err=True)
        if batch.problem:
            typer.echo(batch.problem, err=True)
        if batch.state != "done":
            raise typer.Exit(1)


@contextmanager
def _telling() -> Generator[offline.Told]:
    """Shows how far the work in this process is."""
    with _bar() as bar:
        shown = bar.add_task("reading", total=None, told="")
        first: list[tuple[int, float]] = []

        def told(done: int, total: int) -> None:
            now = time.monotonic()
            first.append((done, now))
            before, since = first[0]
            rate = (done - before) / (now - since) if done > before else None
            left = (total - done) / rate if rate else None
            line = _told(rate, left)
            bar.update(shown, description="running", completed=done, total=total, told=line)

        yield told


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _told(rate: float | None, left: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:.1f}/s" + ("" if left is None else f", {timedelta(seconds=round(left))} left")


def read_settings(**flags: Any) -> Settings:
    """The settings, of which wrong ones end the command."""
    try:
        return Settings.read(**flags)
    except ValueError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the command, which cannot be what was meant."""
    typer.echo(message, err=True)
    raise typer.Exit(2)


INTERRUPTED = 130
