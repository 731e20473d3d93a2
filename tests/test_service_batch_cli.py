"""The commands of batches: what they hand on, what they print, and the sentences they end with."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from service.app import create_app
from service.cli import app
from service.schemas import BatchQuery
from tests.wire import random_levels, serving, settings_for

pytestmark = pytest.mark.usefixtures("small_chunks")
COUNT = 4
IMPUTE = ("--operation", "impute", "--particles", "64", "--quality", "fast", "--seed", "5")


def _call(*arguments: str) -> Result:
    # Wide and without colours, so that words are found whole.
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner(env=environment).invoke(app, ("batch", *arguments))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is the default."""
    monkeypatch.setenv("MISS_IWEM_MODEL", "tiny")


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Some images, of which one is bad."""
    images = np.stack([random_levels(seed) for seed in range(COUNT)]).astype(np.float32) / 255
    images[1] = 7
    np.save(tmp_path / "images.npy", images)
    return str(tmp_path / "images.npy")


@pytest.fixture
def server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A service, of which the environment tells."""
    settings = settings_for(models, batches=str(tmp_path / "batches"))
    with serving(create_app(settings)) as address:
        monkeypatch.setenv("MISS_IWEM_SERVER", address)
        yield


def test_a_batch_is_handed_in_watched_and_fetched(server: None, file: str, tmp_path: Path):
    """From a file to its results, by commands alone."""
    out, errors = tmp_path / "results.jsonl", tmp_path / "errors.jsonl"
    levels = ("--outputs", "mean", "--outputs", "quantiles", "--levels", "0.1", "--levels", "0.9")

    submitted = _call("submit", file, *IMPUTE, *levels, "--wait")
    name = submitted.stdout.split()[0]
    told, listed = _call("status", name), _call("status")
    watched = _call("status", name, "--watch")
    fetched = _call("results", name, str(out), "--errors", str(errors))
    deleted = _call("delete", name)

    for called in (submitted, told, listed, watched, fetched, deleted):
        assert called.exit_code == 0, called.output
    assert "done: 3 done, 1 failed" in submitted.stderr
    assert f"{COUNT}/{COUNT}" in told.stdout
    assert name in listed.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], len(line["quantiles"])) for line in lines] == [
        (0, 2),
        (2, 2),
        (3, 2),
    ]
    assert lines[0]["draws"] is None
    assert len(errors.read_text().splitlines()) == 1
    assert name not in _call("status").stdout


def test_a_batch_that_does_not_succeed_ends_the_watch_with_1(server: None, file: str):
    """Whoever waits for it in a script sees that it has no results."""
    name = _call("submit", file, *IMPUTE, "--particles", "1000000").stdout.strip()
    cancelled = _call("cancel", name)
    watched = _call("status", name, "--watch")

    assert (cancelled.exit_code, cancelled.stdout) == (0, "cancelled\n")
    assert watched.exit_code == 1
    assert "cancelled: " in watched.stderr


def test_a_file_is_worked_on_without_a_service(models: Path, file: str, tmp_path: Path):
    """The folder has the results, and the command says where, and what has none."""
    out = str(tmp_path / "out")
    done = _call("run", file, out, *IMPUTE, "--checkpoints", str(models))

    assert done.exit_code == 0, done.output
    assert done.stdout == f"Done: {out}/results.jsonl\n"
    assert done.stderr == f"1 items have no result, and {out}/errors.jsonl says why.\n"


@pytest.mark.parametrize("command", ["submit", "run"])
def test_every_option_of_a_batch_can_be_given(command: str):
    """Both commands that ask for something have a flag for all that can be asked for."""
    shown = _call(command, "--help").output

    assert [name for name in BatchQuery.model_fields if f"--{name}" not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "FILE"], "--operation"),
        (["submit", "FILE", "--operation", "paint"], "paint"),
        (["submit", "FILE", *IMPUTE, "--particles", "0"], "particles"),
        (["submit", "nothing.npy", *IMPUTE], "nothing.npy"),
        (["submit", "FILE", *IMPUTE, "--server", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["status", "0" * 32], "Expected that of a batch"),
        (["status", "--watch"], "Expected the id"),
        (["results", "0" * 32, "out"], "Expected that of a batch"),
        (["run", "FILE", "OUT", *IMPUTE, "--particles", "0"], "--particles"),
        (["run", "FILE", "OUT", *IMPUTE, "--estimator", "prior"], "--estimator"),
        (["run", "FILE", "OUT", *IMPUTE, "--model", "other"], "expected one of tiny"),
        (["run", "nothing.npy", "OUT", *IMPUTE], "nothing.npy"),
        (["run", "FILE", "OUT", *IMPUTE, "--workers", "2"], "--engine ray"),
        (["run", "FILE", "OUT", *IMPUTE, "--engine", "spark"], "spark"),
    ],
)
def test_a_wrong_call_ends_with_2(
    server: None,
    models: Path,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
):
    """It says what was wrong, without a traceback."""
    monkeypatch.setenv("MISS_IWEM_CHECKPOINTS", str(models))
    places = {"FILE": file, "OUT": str(tmp_path / "out"), "out": str(tmp_path / "out")}
    called = _call(*(places.get(word, word) for word in arguments))

    assert called.exit_code == 2, called.output
    assert words.lower() in re.sub(r"\s+", " ", called.output).lower()
    assert "Traceback" not in called.output


def test_a_wrong_setting_ends_a_run_before_it_begins(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A line says which, what was expected and what came."""
    monkeypatch.setenv("MISS_IWEM_THREADS", "none")
    called = _call("run", file, str(tmp_path / "out"), *IMPUTE)

    assert called.exit_code == 2
    (line,) = called.output.splitlines()
    assert line.startswith("threads (MISS_IWEM_THREADS): ")
    assert line.endswith("got 'none'.")
    assert not (tmp_path / "out").exists()


def test_without_ray_its_engine_says_what_to_install(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before anything is begun."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    called = _call("run", file, str(tmp_path / "out"), *IMPUTE, "--engine", "ray")

    assert called.exit_code == 2
    assert 'pip install ".[ray]"' in called.output
    assert not (tmp_path / "out").exists()
