"""Batches without a service: the same bytes, by whatever works and however often it is killed."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest

from service import offline
from service.app import create_app
from service.errors import BadInput, Conflict, UnknownModel
from service.offline import Outcome
from service.parts import Parts
from service.schemas import BatchQuery
from service.store import Store
from tests.wire import (
    picture,
    random_levels,
    random_mask,
    serving,
    settings_for,
    write_checkpoint,
)

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("small_chunks")
COUNT, PARTS = 20, 7
IMAGES = np.stack([random_levels(seed) for seed in range(COUNT)])
MASKS = np.stack([random_mask(seed) for seed in range(COUNT)])
ASKED: dict[str, Any] = {"operation": "impute", "particles": 64, "seed": 5}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Pictures, of which one is bad."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(COUNT):
            levels = IMAGES[index] if index != 7 else IMAGES[index][:3]
            archive.writestr(f"{index}.png", picture(levels))
            archive.writestr(f"{index}.mask.png", picture(MASKS[index] * np.uint8(255)))
    return path


def _run(source: Any, out: Any, models: Path, **asked: Any) -> Outcome:
    how: dict[str, Any] = {
        name: asked.pop(name) for name in ("engine", "workers") if name in asked
    }
    query = BatchQuery(**{**ASKED, **asked})
    return offline.run(str(source), str(out), query, settings=settings_for(models), **how)


def _served(file: Path, models: Path, folder: Path, **asked: Any) -> tuple[bytes, bytes]:
    """The results and the errors of a service."""
    settings = settings_for(models, batches=str(folder))
    with serving(create_app(settings)) as address, httpx.Client(base_url=address) as client:
        told = {**ASKED, **asked}
        batch = client.post("/v1/batches", params=told, content=file.read_bytes()).json()
        place = f"/v1/batches/{batch['id']}"
        while client.get(place).json()["state"] != "done":  # the test's own limit ends this
            threading.Event().wait(0.05)
        return client.get(f"{place}/results").content, client.get(f"{place}/errors").content


@pytest.fixture
def worked_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that are worked on in this process."""
    numbers: list[int] = []
    work = Parts.work

    async def noted(parts: Parts, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return await work(parts, number, *rest)

    monkeypatch.setattr(Parts, "work", noted)
    return numbers


@pytest.mark.parametrize(
    "asked",
    [
        {"format": "jsonl", "outputs": ["mean", "draws", "quantiles"], "encoding": "npy"},
        {"format": "parquet"},
        {"format": "npz", "operation": "log-likelihood"},
        {"format": "zip", "quality": "fast"},
    ],
    ids=lambda asked: asked["format"],
)
def test_the_bytes_are_those_of_the_service(
    asked: dict[str, Any], file: Path, models: Path, tmp_path: Path
):
    """The same file, options and seed come to the same files, and nothing else is left."""
    out = tmp_path / "out"

    done = _run(file, out, models, **asked)

    results, errors = _served(file, models, tmp_path / "batches", **asked)
    assert Path(done.results).read_bytes() == results
    assert Path(done.errors).read_bytes() == errors
    assert done.failed == 1
    assert json.loads(errors)["id"] == "7"
    names = {f"results.{asked['format']}", "errors.jsonl", "spec.json"}
    assert {path.name for path in out.iterdir()} == names


def test_a_folder_says_what_it_was_begun_with(file: Path, models: Path, tmp_path: Path):
    """Beside the results is what they are of, with a seed though none was asked for."""
    _run(file, tmp_path / "out", models, seed=None)

    spec = json.loads((tmp_path / "out" / "spec.json").read_text())
    assert (spec["operation"], spec["format"], spec["model"]) == ("impute", "jsonl", "tiny")
    assert spec["options"]["particles"] == 64
    assert isinstance(spec["options"]["seed"], int)
    assert len(spec["weights_sha256"]) == len(spec["fingerprint"]) == 64


ENDLESS = """
import asyncio, signal
from service import batches, cli, parts

async def work(self, number, *rest):
    if number >= 3:
        await asyncio.sleep(3600)
    return await whole(self, number, *rest)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
batches.MOST_ITEMS = 3
whole, parts.Parts.work = parts.Parts.work, work
cli.app()
"""
"""The command line, with small parts, of which it never ends more than the first three."""


def _begun(file: Path, out: Path, models: Path) -> subprocess.Popen[bytes]:
    options = ["--operation=impute", "--particles=6000", "--seed=5", "--quality=fast"]
    return subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "batch", "run", file, out, *options],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MISS_IWEM_CHECKPOINTS": str(models),
            "MISS_IWEM_MODEL": "tiny",
        },
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_what_was_stopped_goes_on_where_it_was(
    number: signal.Signals, file: Path, models: Path, tmp_path: Path, worked_on: list[int]
):
    """Stopped in the middle, a run does not do again what was done, and has the same bytes."""
    asked = {"particles": 6000, "quality": "fast"}
    out = tmp_path / "out"
    with _begun(file, out, models) as process:
        try:
            while len(list(out.glob("*/results/*"))) < 2:
                assert process.poll() is None
                threading.Event().wait(0.01)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    finished = {int(path.name) for path in out.glob("*/results/*")}

    again = _run(file, out, models, **asked)

    assert 2 <= len(finished) < PARTS
    assert sorted(worked_on) == sorted(set(range(PARTS)) - finished)
    whole = _run(file, tmp_path / "whole", models, **asked)
    assert Path(again.results).read_bytes() == Path(whole.results).read_bytes()
    assert Path(again.errors).read_bytes() == Path(whole.errors).read_bytes()
    if number == signal.SIGINT:
        assert (process.returncode, b"goes on from here" in told) == (130, True)


def test_what_is_done_is_not_done_again(
    file: Path, models: Path, tmp_path: Path, worked_on: list[int]
):
    """A folder that has its results is left as it is, with or without the seed."""
    done = _run(file, tmp_path / "out", models)
    before = Path(done.results).stat()
    worked_on.clear()

    assert _run(file, tmp_path / "out", models) == done
    assert _run(file, tmp_path / "out", models, seed=None) == done
    assert worked_on == []
    assert Path(done.results).stat() == before


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"particles": 65}, r"begun with, particles 64; got particles 65\."),
        ({"seed": 6}, r"begun with, seed 5; got seed 6\."),
        ({"format": "npz"}, r"begun with, format jsonl; got format npz\."),
        ({"operation": "log-likelihood"}, "begun with, operation impute, "),
    ],
    ids=["an option", "the seed", "the format", "the operation"],
)
def test_a_folder_is_gone_on_with_as_it_was_begun(
    asked: dict[str, Any], sentence: str, file: Path, models: Path, tmp_path: Path
):
    """What is asked for otherwise is refused with what it was, and what it is now."""
    _run(file, tmp_path / "out", models)

    with pytest.raises(Conflict, match=sentence):
        _run(file, tmp_path / "out", models, **asked)


def test_another_input_or_model_is_refused(file: Path, models: Path, tmp_path: Path):
    """A folder's results are all of one file and of one model."""
    _run(file, tmp_path / "out", models)
    other = tmp_path / "other.npy"
    np.save(other, IMAGES)

    with pytest.raises(Conflict, match="begun with, input "):
        _run(other, tmp_path / "out", models)
    write_checkpoint(models, seed=1)
    with pytest.raises(Conflict, match="begun with, weights "):
        _run(file, tmp_path / "out", models)


def test_a_folder_of_something_else_is_left_alone(file: Path, models: Path, tmp_path: Path):
    """Nothing is written where other files are."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results").write_text("of mine")

    with pytest.raises(Conflict, match=r"to be empty, or begun before; got one with results\."):
        _run(file, tmp_path / "out", models)


def test_what_cannot_be_done_is_refused_at_once(file: Path, models: Path, tmp_path: Path):
    """Options, models and files that are none leave nothing begun."""
    np.save(tmp_path / "wide.npy", np.zeros((2, 9, 9), np.uint8))

    with pytest.raises(BadInput, match="tolerance"):
        _run(file, tmp_path / "out", models, quality="high", tolerance=0.1)
    with pytest.raises(UnknownModel, match="other"):
        _run(file, tmp_path / "out", models, model="other")
    with pytest.raises(BadInput, match="6x5 pixels"):
        _run(tmp_path / "wide.npy", tmp_path / "out", models)
    with pytest.raises(FileNotFoundError):
        _run(tmp_path / "nothing.npy", tmp_path / "out", models)
    assert list((tmp_path / "out").glob("[!.]*")) == []


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """A place that is not on this machine's disk."""
    address = f"memory://{uuid4().hex}"
    yield address
    Store(address).remove("")


def test_files_may_be_anywhere(file: Path, models: Path, tmp_path: Path, elsewhere: str):
    """From a bucket to a bucket the bytes are the same."""
    here = _run(file, tmp_path / "out", models)
    with Store(elsewhere).writing("images.zip") as path:
        path.write_bytes(file.read_bytes())

    there = _run(f"{elsewhere}/images.zip", f"{elsewhere}/out", models)

    store = Store(f"{elsewhere}/out")
    assert there.results == f"{elsewhere}/out/results.jsonl"
    with store.open("results.jsonl") as results:
        assert results.read() == Path(here.results).read_bytes()
    assert store.names() == ["errors.jsonl", "results.jsonl", "spec.json"]


def test_it_is_told_how_far_it_is(file: Path, models: Path, tmp_path: Path):
    """Counts go from what was done before to all of the items."""
    counts: list[tuple[int, int]] = []
    query = BatchQuery(**ASKED)

    offline.run(
        str(file),
        str(tmp_path / "out"),
        query,
        settings=settings_for(models),
        told=lambda done, total: counts.append((done, total)),
    )

    assert [done for done, _ in counts] == sorted(done for done, _ in counts)
    assert (counts[0], counts[-1]) == ((0, COUNT), (COUNT, COUNT))
    assert len(counts) == PARTS + 1


@pytest.mark.filterwarnings("default")  # of Ray's own
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed.")
def test_rays_bytes_are_the_same(file: Path, models: Path, tmp_path: Path):
    """Two processes of Ray's come to the files of one."""
    alone = _run(file, tmp_path / "alone", models)

    together = _run(file, tmp_path / "together", models, engine="ray", workers=2)

    assert Path(together.results).read_bytes() == Path(alone.results).read_bytes()
    assert Path(together.errors).read_bytes() == Path(alone.errors).read_bytes()


def test_an_input_may_be_of_any_kind(models: Path, tmp_path: Path):
    """An archive of arrays is read as the service reads it."""
    out = io.BytesIO()
    np.savez(out, images=IMAGES, masks=MASKS)
    (tmp_path / "images.npz").write_bytes(out.getvalue())

    done = _run(tmp_path / "images.npz", tmp_path / "out", models, quality="fast")

    assert done.failed == 0
    assert len(Path(done.results).read_text().splitlines()) == COUNT
