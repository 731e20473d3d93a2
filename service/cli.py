"""The command line, `miss-iwem`."""

import importlib.util
import json
import logging
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import typer
import uvicorn
from rich.console import Console
from rich.table import Table

from service.app import create_app, working
from service.batch_cli import batch_app, fail, read_settings
from service.settings import processors

__all__ = ["app", "commands", "serve"]

app = typer.Typer(
    help="Several honest completions, with a likelihood, for images with missing pixels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(batch_app, name="batch")

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command()
def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of the checkpoints.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the model.")] = None,
) -> None:
    """Serve over HTTP; every setting is also an environment variable MISS_IWEM_<NAME>."""
    settings = read_settings(
        http_host=host, http_port=port, checkpoints=checkpoints, device=device, threads=threads
    )
    served = create_app(settings)
    # uvicorn drains on SIGTERM, and then raises it again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(served.state.status))
    logging.getLogger("uvicorn.access").addFilter(_is_told)
    uvicorn.run(
        served,
        host=settings.http_host,
        port=settings.http_port,
        timeout_graceful_shutdown=math.ceil(settings.drain),
    )


def _is_told(access: logging.LogRecord) -> bool:
    """Refusals come by the hundred: the engine tells their number."""
    return not (isinstance(access.args, tuple) and HTTPStatus.TOO_MANY_REQUESTS in access.args)


@app.command()
def worker(
    *,
    database: Annotated[str | None, typer.Option(help="PostgreSQL's address.")] = None,
    batches: Annotated[str | None, typer.Option(help="The folder or bucket of batches.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the model.")] = None,
) -> None:
    """Work on batches, as one of any number; every setting is also a variable MISS_IWEM_<NAME>."""
    settings = read_settings(database=database, batches=batches, device=device, threads=threads)
    if not settings.database or not settings.batches:
        fail("Expected a database and a place of batches, which workers share; got none.")
    working(settings)


@app.command(context_settings=PASS_ON)
def train(context: typer.Context) -> None:
    """Train a model: RECIPE, or --data with --missing; --help lists everything."""
    from model.train import main  # noqa: PLC0415  (the service needs no training code)

    sys.exit(main([f"--threads={_threads()}", *context.args]))


@app.command()
def fit(
    out: Annotated[Path, typer.Argument(help="The checkpoint's folder, which is made.")],
    *,
    data: Annotated[str, typer.Option(help="A data set's name, a .npz or a folder of PNGs.")],
    missing: Annotated[
        str, typer.Option(help="What the images lack beside their own holes, such as patches:3.")
    ] = "none",
    latent: int = 40,
    isotropic: Annotated[
        bool, typer.Option(help="The same noise for all pixels: probabilistic PCA.")
    ] = False,
    iterations: Annotated[int, typer.Option(help="Of EM, at most.")] = 100,
    tolerance: Annotated[float, typer.Option(help="Nats that an iteration must bring.")] = 0.01,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; one a processor.")] = None,
    seed: int = 0,
) -> None:
    """Fit factor analysis to grey levels by EM: a model whose answers are exact."""
    import torch  # noqa: PLC0415

    from model.fit import Fit  # noqa: PLC0415
    from model.fit import fit as climb  # noqa: PLC0415

    torch.set_num_threads(threads or _threads())
    try:
        asked = Fit(
            data=data,
            missing=missing,
            latent=latent,
            isotropic=isotropic,
            iterations=iterations,
            tolerance=tolerance,
            seed=seed,
        )
        card = climb(out, asked)
    except (ValueError, OSError) as error:
        fail(str(error))
    training = card.training
    typer.echo(
        f"Done: {out}, {training['epochs']} iterations, log p of what is observed of an image "
        f"{training['train_bound']:.2f} in training and {training['validation_bound']:.2f} apart."
    )


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="The checkpoint.")],
    *,
    scores: Annotated[
        str, typer.Option(help="Of raw,tight,predictive,diagnostics.")
    ] = "raw,predictive,diagnostics",
    images: Annotated[int, typer.Option(help="Test images of all but raw and tight.")] = 1000,
    particles: Annotated[int, typer.Option(help="Particles of all but raw and tight.")] = 1000,
    raw_images: Annotated[int | None, typer.Option(help="Of `raw` and `tight`; all.")] = None,
    raw_particles: Annotated[int, typer.Option(help="Of `raw` and `tight`.")] = 5000,
    data: Annotated[
        str | None, typer.Option(help="The file or folder of the data, where they have no name.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; one a processor.")] = None,
    seed: int = 0,
) -> None:
    """Measure a checkpoint on its test images, and write the results into its card.

    The diagnostics are drawn too, as diagnostics.png beside the card.
    """
    import torch  # noqa: PLC0415

    from model.evaluate import evaluate as measure  # noqa: PLC0415

    asked = scores.split(",")
    if "diagnostics" in asked:
        _needs_plots()
    torch.set_num_threads(threads or _threads())
    try:
        card = measure(
            folder,
            scores=asked,
            images=images,
            particles=particles,
            raw_images=raw_images,
            raw_particles=raw_particles,
            source=data,
            seed=seed,
        )
    except (ValueError, OSError) as error:
        fail(str(error))
    _show(card.results)
    if "diagnostics" in asked:
        from model.curves import diagnostics  # noqa: PLC0415

        diagnostics(card.results["diagnostics"], folder / "diagnostics.png")


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help="complete, missing or findings.")],
    *,
    only: Annotated[
        list[str] | None, typer.Option(help="A part of the names of the cells that are wanted.")
    ] = None,
    budget: Annotated[str, typer.Option(help="Time, such as 2h or 30m.")] = "2h",
    schedule: Annotated[
        str,
        typer.Option(
            help="slides, or fewer epochs: short, brisk, muon, muon-decay, muon-long, "
            "muon-decay-long, long, lean."
        ),
    ] = "short",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each cell.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each; as many as share the processors.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    docs: Annotated[Path, typer.Option(help="Where results.md and results/ go.")] = Path("docs"),
) -> None:
    """Train and score what is not done yet of a table of the slides, and write its results.

    Ends with status 1 while something is left.
    """
    _needs_plots()
    from model.reproduce import reproduce as run  # noqa: PLC0415
    from model.tables import SCHEDULES, TABLES, cells  # noqa: PLC0415

    for name, value, known in (("table", table, TABLES), ("schedule", schedule, SCHEDULES)):
        if value not in known:
            fail(f"Expected a {name} of {', '.join(known)}; got {value!r}.")
    units = {"h": 60, "m": 1}
    if budget[-1:] not in units or not budget[:-1].isdecimal():
        fail(f"Expected a budget such as 2h or 30m; got {budget!r}.")
    chosen = list(cells(table, schedule=schedule, seeds=seeds, only=only or ()))
    if not chosen:
        fail(f"Expected parts of the names of cells; got {', '.join(only or ())!r}.")
    try:
        docs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"Expected a folder for docs; got {docs}: {error}.")
    with commands() as call:
        done = run(
            chosen,
            call,
            runs=runs,
            docs=docs,
            minutes=float(budget[:-1]) * units[budget[-1]],
            jobs=jobs,
            threads=threads or _threads(jobs),
            console=Console(highlight=False),
        )
    if not done:
        raise typer.Exit(1)


@contextmanager
def commands() -> Generator[Callable[[Sequence[str]], int]]:
    """Runs commands of this program, from any thread, and gives their exit status.

    A signal to stop goes on to those that run, which save what they have; no other begins, and
    this process ends once they have ended.
    """
    from model.train import on_stop  # noqa: PLC0415

    running, stopped = set[subprocess.Popen[bytes]](), list[int]()

    def call(words: Sequence[str]) -> int:
        with subprocess.Popen([sys.executable, "-m", "service", *words]) as process:
            running.add(process)
            if stopped:
                process.terminate()
            status = process.wait()
            running.remove(process)
            return status

    def stop(number: int) -> None:
        stopped.append(number)
        for process in tuple(running):
            process.send_signal(number)
        sys.exit(128 + number)

    with on_stop(stop):
        yield call


@app.command()
def picture(
    folder: Annotated[Path, typer.Argument(help="The checkpoint.")],
    path: Annotated[Path, typer.Argument(help="The PNG to write.")],
    *,
    missing: Annotated[str, typer.Option(help="What is hidden, such as patches:6.")] = "patches:3",
    images: int = 10,
    draws: int = 5,
    ambiguous: Annotated[bool, typer.Option(help="Those whose draws differ most.")] = False,
    data: Annotated[
        str | None, typer.Option(help="The file or folder of the data, where they have no name.")
    ] = None,
    seed: int = 0,
) -> None:
    """Draw test images as columns: the truth, what was seen, the mean, and completions."""
    from model.evaluate import picture as draw  # noqa: PLC0415

    try:
        draw(
            folder,
            path,
            missing=missing,
            images=images,
            draws=draws,
            ambiguous=ambiguous,
            source=data,
            seed=seed,
        )
    except (ValueError, OSError) as error:
        fail(str(error))


@app.command()
def models(
    folder: Annotated[Path, typer.Argument(help="Folder of checkpoints.")] = Path("checkpoints"),
) -> None:
    """List the checkpoints of a folder."""
    from model.checkpoint import CheckpointError, read_card  # noqa: PLC0415

    table = Table("name", "objective", "missing", "data", "epochs", "validation bound")
    paths = sorted(folder.glob("[!.]*/card.json"))
    if not paths:
        fail(f"Expected checkpoints in {folder}; got none.")
    for path in paths:
        try:
            card = read_card(path.parent)
        except CheckpointError as error:
            fail(str(error))
        table.add_row(
            card.name,
            card.objective,
            card.missing,
            str(card.data["name"]),
            str(card.training["epochs"]),
            str(card.training["validation_bound"]),
        )
    Console().print(table)


@data_app.command()
def fetch(name: str) -> None:
    """Download a data set's public files, checked by their SHA-256."""
    from model import data  # noqa: PLC0415

    try:
        for path in data.fetch(name):
            typer.echo(path)
    except (data.DataError, OSError) as error:
        fail(str(error))


def _needs_plots() -> None:
    """Fails before hours of work, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        fail('Expected matplotlib, which draws the plots; got none. Run: pip install ".[train]"')


def _show(results: dict[str, Any]) -> None:
    typer.echo(json.dumps(results, indent=2, ensure_ascii=False))


def _threads(jobs: int = 1) -> int:
    """As many as share the processors that may be used."""
    return max(1, int(processors() / jobs))
