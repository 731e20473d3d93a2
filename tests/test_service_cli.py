"""The command line: it serves what it was told to, and a wrong call ends with 2 and a sentence."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from filelock import FileLock
from typer.testing import CliRunner, Result

from service import cli
from service.settings import Settings
from tests.wire import write_checkpoint


def _call(*arguments: str) -> Result:
    # Wide and without colours, so that words are found whole.
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    return CliRunner(env=environment).invoke(cli.app, arguments)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been served, and how."""
    given: dict[str, Any] = {}

    def create(settings: Settings) -> FastAPI:
        given["settings"] = settings
        return FastAPI()

    def run(_app: FastAPI, **options: Any) -> None:
        given.update(options)

    monkeypatch.setattr(cli, "create_app", create)
    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MISS_IWEM_{name.upper()}", raising=False)
    return given


def test_help_names_every_flag():
    """`serve --help` has each flag and tells of the environment."""
    shown = _call("serve", "--help")

    assert shown.exit_code == 0
    for word in ("--host", "--port", "--checkpoints", "--device", "--threads", "MISS_IWEM_"):
        assert word in shown.stdout


def test_without_a_command_there_is_help():
    """All commands are listed."""
    shown = _call()

    assert all(word in shown.output for word in ("serve", "train", "evaluate", "models", "data"))


def test_flags_are_settings(served: dict[str, Any]):
    """Each flag sets its setting, and the server listens where it was told to."""
    flags = ["--host", "0.0.0.0", "--port", "99", "--checkpoints", "here", "--device", "cpu"]
    called = _call("serve", *flags, "--threads", "3")

    settings = served["settings"]
    assert called.exit_code == 0
    assert (settings.checkpoints, settings.device, settings.threads) == (Path("here"), "cpu", 3)
    assert (served["host"], served["port"]) == ("0.0.0.0", 99)
    assert served["timeout_graceful_shutdown"] == settings.drain


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], "--threads=1"), (["--threads=3"], "--threads=3"), (["--threads", "3"], "3")],
)
def test_training_keeps_to_the_quota(
    monkeypatch: pytest.MonkeyPatch, given: list[str], expected: str
):
    """Without --threads it has as many threads as whole processors; what is given goes last."""
    heard: list[str] = []
    monkeypatch.setattr(cli, "processors", lambda: 1.5)
    monkeypatch.setattr("model.train.main", lambda words: heard.extend(words) or 0)

    assert _call("train", "patches-6", *given).exit_code == 0
    assert [word for word in heard if word != "patches-6"][-1] == expected


def test_the_environment_holds_where_no_flag_is(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """A flag goes before the variable, and the variable before the default."""
    monkeypatch.setenv("MISS_IWEM_HTTP_PORT", "81")
    monkeypatch.setenv("MISS_IWEM_THREADS", "5")
    monkeypatch.setenv("MISS_IWEM_DRAIN", "0.5")
    _call("serve", "--port", "82")

    assert served["port"] == 82
    assert served["settings"].threads == 5
    assert served["timeout_graceful_shutdown"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "70000"], "http_port"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--threads", "0"], "threads"),
        (["serve", "--device", "gpu"], "device"),
        (["serve", "--sideways"], "--sideways"),
        (["fly"], "fly"),
        (["models", "nowhere"], "got none"),
        (["evaluate", "nowhere"], "nowhere"),
        (["picture", "nowhere", "out.png"], "nowhere"),
        (["data", "fetch", "nothing"], "nothing"),
        (["data"], ""),
    ],
)
def test_a_wrong_call_ends_with_2(served: dict[str, Any], arguments: list[str], words: str):
    """It says what was wrong, without a traceback, and nothing is served."""
    called = _call(*arguments)

    assert called.exit_code == 2
    assert words in re.sub(r"\s+", " ", called.output)
    assert "Traceback" not in called.output
    assert "settings" not in served


def test_models_lists_the_checkpoints(tmp_path: Path):
    """Each by name, with what it was trained for."""
    write_checkpoint(tmp_path)
    write_checkpoint(tmp_path, "other")
    shown = _call("models", str(tmp_path))

    assert shown.exit_code == 0
    assert "tiny" in shown.stdout
    assert "other" in shown.stdout
    assert "miss-iwem" in shown.stdout


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path):
    """A damaged card ends the list with 2."""
    write_checkpoint(tmp_path)
    card = tmp_path / "tiny" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "format_version": 99}))
    called = _call("models", str(tmp_path))

    assert called.exit_code == 2
    assert "format 99" in called.output


@pytest.mark.parametrize("command", [["evaluate", "x"], ["reproduce", "complete"]])
def test_without_what_draws_plots_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, command: list[str]
):
    """The error says what to install, before anything is measured."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = _call(*command)

    assert result.exit_code == 2
    assert 'pip install ".[train]"' in result.output


def test_what_cannot_be_written_is_said_first(tmp_path: Path):
    """A file where a folder should be: a sentence and status 2, before anything is computed."""
    write_checkpoint(tmp_path)
    (tmp_path / "file").touch()
    np.savez(tmp_path / "grey.npz", train=np.ones((60, 6, 6), np.float32))
    data = f"--data={tmp_path / 'grey.npz'}"
    words = [
        ("picture", str(tmp_path / "tiny"), str(tmp_path / "file" / "picture.png"), data),
        ("fit", str(tmp_path / "file" / "model"), data),
        ("reproduce", "complete", "--only=static-mnist-mlp.vae", f"--docs={tmp_path / 'file'}"),
    ]

    for called in (_call(*each) for each in words):
        assert called.exit_code == 2
        assert "file" in called.output
        assert "Traceback" not in called.output


def test_a_table_that_is_not_done_ends_with_1(tmp_path: Path):
    """So that a script can tell, though the page is written."""
    called = _call(
        "reproduce",
        "complete",
        "--only=static-mnist-mlp.vae",
        "--budget=0h",
        f"--docs={tmp_path / 'docs'}",
        f"--runs={tmp_path / 'runs'}",
    )

    assert called.exit_code == 1
    assert (tmp_path / "docs" / "results.md").exists()


def test_factor_analysis_is_fitted_evaluated_and_drawn(tmp_path: Path):
    """From a file of grey images to a checkpoint with results and a plot."""
    levels = np.random.default_rng(0).random((60, 6, 5)).astype(np.float32)
    np.savez(tmp_path / "grey.npz", train=levels)
    data = f"--data={tmp_path / 'grey.npz'}"
    fitted = _call("fit", str(tmp_path / "fa"), data, "--latent=2", "--iterations=5")
    measured = _call("evaluate", str(tmp_path / "fa"), data, "--images=5", "--particles=64")
    again = _call("fit", str(tmp_path / "fa"), data)

    assert fitted.exit_code == measured.exit_code == 0, measured.output
    assert "Done" in fitted.output
    assert set(json.loads(measured.stdout)) == {"raw", "predictive", "diagnostics"}
    assert (tmp_path / "fa" / "diagnostics.png").stat().st_size > 1000
    assert again.exit_code == 2
    assert "a new folder" in again.output


COMMANDS = """
import sys
from service.cli import commands
with commands() as call:
    call(sys.argv[1:])
"""


@pytest.mark.timeout(300)  # processes to start, on a machine that may have other work
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_on_to_the_commands_that_run(number: signal.Signals, tmp_path: Path):
    """The training that is under way saves its state and ends before the one who called it."""
    images = np.random.default_rng(0).integers(0, 2, (40, 1, 4, 4), dtype=np.uint8) * 255
    np.savez(tmp_path / "images.npz", train=images, validation=images, test=images)
    folder = tmp_path / "run"
    words = ["train", f"--data={tmp_path / 'images.npz'}", "--epochs=100000", "--patience=100000"]
    words += [f"--out={folder}", "--hidden=4,4", "--latent=2", "--particles=2", "--threads=1"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS, *words], stderr=subprocess.PIPE, text=True
    ) as caller:
        while not (folder / "checkpoint").exists():  # the test's own limit ends this
            assert caller.poll() is None, caller.communicate()[1]
            time.sleep(0.01)
        caller.send_signal(number)
        said = caller.communicate()[1]

    assert caller.returncode == 128 + number
    assert "Stopped after step" in said
    with FileLock(folder / ".lock", timeout=0):  # nobody works on it any more
        assert (folder / "state.safetensors").exists()
