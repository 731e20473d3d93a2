"""Batches over real HTTP: what is handed in comes back whole, whatever happens meanwhile."""

import errno
import io
import json
import socket
import threading
import zipfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import EndpointConnectionError

from service import batches, worker
from service.app import create_app
from service.store import Store
from tests.wire import (
    npy,
    picture,
    pixels_of,
    random_levels,
    random_mask,
    serving,
    settings_for,
    text,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("small_chunks")
COUNT = 20
IMAGES = np.stack([random_levels(seed) for seed in range(COUNT)])
MASKS = np.stack([random_mask(seed) for seed in range(COUNT)])


def _npz(**changes: Any) -> bytes:
    arrays = {"images": IMAGES, "masks": MASKS, "truths": IMAGES, **changes}
    out = io.BytesIO()
    kept: Any = {name: array for name, array in arrays.items() if array is not None}
    np.savez(out, **kept)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the batches are."""
    return tmp_path / "batches"


@contextmanager
def _service(models: Path, folder: Path, **changes: Any) -> Generator[httpx.Client]:
    settings = settings_for(models, batches=str(folder), **changes)
    with serving(create_app(settings)) as address, httpx.Client(base_url=address) as client:
        yield client


@pytest.fixture
def client(models: Path, folder: Path) -> Iterator[httpx.Client]:
    """Of a service with one worker in itself."""
    with _service(models, folder) as client:
        yield client


def _submit(client: httpx.Client, content: bytes, **options: Any) -> dict[str, Any]:
    headers = {"Idempotency-Key": options.pop("key")} if "key" in options else {}
    asked = {"operation": "impute", "particles": 64, "seed": 5, "quality": "fast", **options}
    answer = client.post("/v1/batches", params=asked, content=content, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/v1/batches/{answer.json()['id']}"
    assert int(answer.headers["Retry-After"]) > 0
    return answer.json()


def _ended(client: httpx.Client, batch: dict[str, Any], state: str = "done") -> dict[str, Any]:
    while True:  # the test's own limit ends this
        told = client.get(f"/v1/batches/{batch['id']}").json()
        if told["finished_at"] is not None:
            assert told["state"] == state, told
            return told
        threading.Event().wait(0.05)


def _lines(client: httpx.Client, batch: dict[str, Any], what: str = "results") -> list[Any]:
    answer = client.get(f"/v1/batches/{batch['id']}/{what}")
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def _files(folder: Path) -> set[str]:
    """What there is besides the database."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("batches.sqlite")}


@pytest.mark.parametrize("operation", ["impute", "log-likelihood"])
def test_results_are_those_of_requests(operation: str, client: httpx.Client):
    """A result of a batch is that of a request for the image alone with the result's seed."""
    options = {"outputs": ["mean", "draws", "quantiles"], "draws": 2, "encoding": "npy"}
    chosen: dict[str, Any] = options if operation == "impute" else {}

    batch = _submit(client, _npz(), operation=operation, quality="auto", **chosen)
    _ended(client, batch)

    lines = _lines(client, batch)
    assert [line.pop("index") for line in lines] == list(range(COUNT))
    for index, line in enumerate(lines):
        item = {"image": text(npy(IMAGES[index])), "mask": text(npy(MASKS[index]))}
        if operation == "log-likelihood":
            item["truth"] = item["image"]
        body = {"images": [item], "particles": 64, "seed": line["seed"], **chosen}
        answer = client.post(f"/v1/{operation}", json=body)
        assert answer.json()["results"] == [line]


def test_a_state_says_what_was_asked_and_how_far_it_is(client: httpx.Client):
    """What is told of a batch has its options, model, counts and times."""
    card = client.get("/v1/models").json()["models"][0]

    batch = _ended(client, _submit(client, _npz(), draws=3))

    assert batch["options"]["draws"] == 3
    assert batch["options"]["seed"] == 5
    assert batch["weights_sha256"] == card["weights_sha256"]
    assert (batch["total"], batch["done"], batch["failed"]) == (COUNT, COUNT, 0)
    created, started, finished, expires = (
        datetime.fromisoformat(batch[f"{name}_at"])
        for name in ("created", "started", "finished", "expires")
    )
    assert created <= started <= finished < expires
    assert batch["problem"] is None


@pytest.mark.parametrize("kind", ["parquet", "npz", "zip"])
def test_every_kind_of_results_has_the_same(kind: str, client: httpx.Client):
    """Tables, arrays and pictures have the numbers and pixels of the lines."""
    asked = {"outputs": ["mean", "draws"], "encoding": "png"}
    lines, other = (_submit(client, _npz(), format=form, **asked) for form in ("jsonl", kind))
    _ended(client, lines)
    _ended(client, other)

    expected = _lines(client, lines)
    answer = client.get(f"/v1/batches/{other['id']}/results")

    means = [pixels_of(line["mean"]) for line in expected]
    values = [line["log_likelihood"]["value"] for line in expected]
    content = io.BytesIO(answer.content)
    assert answer.headers["content-disposition"].endswith(f'results.{kind}"')
    if kind == "npz":
        with np.load(content, allow_pickle=False) as arrays:
            assert arrays["log_likelihood_value"].tolist() == values
            found = list((arrays["mean"][:, 0] * 255).round())
    elif kind == "zip":
        with zipfile.ZipFile(content) as archive:
            told = [json.loads(line) for line in archive.read("results.jsonl").splitlines()]
            assert [row["log_likelihood"]["value"] for row in told] == values
            names = [f"item-{index}.mean.png" for index in range(COUNT)]
            found = [pixels_of(text(archive.read(name))) for name in names]
    else:
        rows = pq.read_table(content).to_pylist()
        assert [row["log_likelihood"]["value"] for row in rows] == values
        found = [pixels_of(text(row["mean"])) for row in rows]
    assert all((mean == other).all() for mean, other in zip(means, found, strict=True))


def test_bad_items_fail_alone_and_names_are_kept(client: httpx.Client):
    """Of many items those that are bad have a line that says why; the others have results."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for index in range(COUNT):
            levels = IMAGES[index] if index != 7 else IMAGES[index][:3]
            archive.writestr(f"x/{index}.png", picture(levels))
        archive.writestr("../escape.png", picture(IMAGES[0]))
        archive.writestr("notes.txt", "hello")

    batch = _ended(client, _submit(client, out.getvalue(), outputs=["mean"]))

    assert (batch["total"], batch["done"], batch["failed"]) == (COUNT + 2, COUNT - 1, 3)
    kept = [index for index in range(COUNT) if index != 7]
    assert [(line["index"], line["id"]) for line in _lines(client, batch)] == [
        (index, f"x/{index}") for index in kept
    ]
    told = [
        (line["index"], line["id"], line["problem"]["status"], line["problem"]["errors"][0])
        for line in _lines(client, batch, "errors")
    ]
    assert [(index, name, status) for index, name, status, _ in told] == [
        (7, "x/7", 422),
        (COUNT, "../escape", 422),
        (COUNT + 1, "notes", 415),
    ]
    assert told[0][3] == {"field": "image", "expected": "6x5 pixels", "got": "3x5"}


BAD: dict[str, tuple[bytes, dict[str, Any], int, str]] = {
    "no file": (b"", {}, 415, "body"),
    "no items": (_npz(images=IMAGES[:0], masks=None, truths=None), {}, 422, "body"),
    "images of another size": (npy(IMAGES[:, :3]), {}, 422, "items[0].image"),
    "an unknown option": (_npz(), {"particels": 3}, 422, "particels"),
    "an option of the other": (_npz(), {"estimator": "importance"}, 422, "estimator"),
    "no number": (_npz(), {"particles": "many"}, 422, "particles"),
    "too many": (_npz(), {"particles": 10**7}, 422, "particles"),
    "too much": (_npz(), {"particles": 10**6, "quality": "high"}, 413, "particles"),
    "options that do not go together": (
        _npz(),
        {"quality": "high", "tolerance": 0.1},
        422,
        "tolerance",
    ),
    "no pictures of numbers": (
        _npz(),
        {"operation": "log-likelihood", "format": "zip"},
        422,
        "format",
    ),
    "no such model": (_npz(), {"model": "other"}, 404, "model"),
}


def test_what_cannot_be_done_is_refused_at_once(client: httpx.Client, folder: Path):
    """A batch that is bad as a whole is a problem that names the field, and leaves nothing."""
    for kind, (content, options, status, field) in BAD.items():
        asked = {"operation": "impute", "quality": "fast", **options}
        answer = client.post("/v1/batches", params=asked, content=content)

        assert answer.status_code == status, (kind, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["errors"][0]["field"] == field, kind
        assert client.get("/v1/batches").json()["batches"] == []
        assert _files(folder) == set()


def test_bad_items_at_the_beginning_do_not_refuse_good_ones(client: httpx.Client):
    """A batch is taken in if any of its first items can be worked on."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.png", b"no picture")
        archive.writestr("b.png", picture(IMAGES[0]))

    batch = _ended(client, _submit(client, out.getvalue()))

    assert (batch["done"], batch["failed"]) == (1, 1)


def test_the_same_key_is_the_same_batch(client: httpx.Client):
    """Sent again with its key, a batch is the one there is; with other content it is refused."""
    first = _submit(client, _npz(), key="k")

    again = _submit(client, _npz(), key="k")

    assert again["id"] == first["id"]
    for content, changes in ((_npz(truths=None), {}), (_npz(), {"particles": 65})):
        asked = {"operation": "impute", "particles": 64, "seed": 5, "quality": "fast", **changes}
        answer = client.post(
            "/v1/batches", params=asked, content=content, headers={"Idempotency-Key": "k"}
        )
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
    assert len(client.get("/v1/batches").json()["batches"]) == 1
    _ended(client, first)


def test_batches_are_listed_in_pages(client: httpx.Client):
    """The latest come first, and the pages together have each batch once."""
    ids = [_submit(client, _npz(), seed=seed)["id"] for seed in range(3)]

    first = client.get("/v1/batches", params={"limit": 2}).json()
    second = client.get("/v1/batches", params={"limit": 2, "offset": first["next"]}).json()

    assert {batch["id"] for batch in [*first["batches"], *second["batches"]]} == set(ids)
    assert (len(first["batches"]), len(second["batches"]), second["next"]) == (2, 1, None)


def test_results_can_be_had_in_parts(client: httpx.Client):
    """A download that broke off goes on where it was."""
    batch = _ended(client, _submit(client, _npz()))
    address = f"/v1/batches/{batch['id']}/results"

    whole = client.get(address).content
    answer = client.get(address, headers={"Range": "bytes=100-"})

    assert answer.status_code == 206
    assert whole[:100] + answer.content == whole


def test_a_cancelled_batch_ends_and_can_be_deleted(client: httpx.Client, folder: Path):
    """No more is done of it; it has no results, and after its deletion there is nothing left."""
    batch = _submit(client, _npz(), particles=1_000_000)
    address = f"/v1/batches/{batch['id']}"

    while client.get(address).json()["total"] is None:
        threading.Event().wait(0.05)
    running = client.delete(address)
    client.post(f"{address}/cancel")

    assert (running.status_code, running.json()["type"]) == (409, "urn:miss-iwem:problem:conflict")
    told = _ended(client, batch, "cancelled")
    assert told["done"] < COUNT
    assert client.get(f"{address}/results").status_code == 409
    assert client.delete(address).status_code == 204
    assert client.get(address).status_code == 404
    other = _submit(client, _npz(images=IMAGES[:1], masks=None, truths=None))
    assert _ended(client, other)["done"] == 1  # what was cancelled does not hold it up
    assert _files(folder) == {f"{other['id']}/results.jsonl", f"{other['id']}/errors.jsonl"}


def test_there_is_no_other_batch(client: httpx.Client):
    """An id that is none is not found, whatever it looks like."""
    for name in ("0" * 32, "nothing", "..%2f..%2fetc%2fpasswd"):
        for address in ("", "/results", "/errors"):
            assert client.get(f"/v1/batches/{name}{address}").status_code == 404


def test_a_file_that_is_too_large_is_refused(models: Path, folder: Path):
    """No more than a batch may have is written, and that is removed again."""
    with _service(models, folder, max_batch=1000) as client:
        answer = client.post("/v1/batches", params={"operation": "impute"}, content=_npz())

        assert answer.status_code == 413
        assert _files(folder) == set()


def test_where_there_is_no_room_a_batch_is_refused(models: Path, folder: Path):
    """What is kept counts; when something is deleted there is room again."""
    with _service(models, folder, quota=10**6) as client:
        batch = _ended(client, _submit(client, _npz(), outputs=["mean"]))
        large = npy(np.zeros((50_000, 6, 5), np.uint8))

        answer = client.post("/v1/batches", params={"operation": "impute"}, content=large)

        assert (answer.status_code, answer.json()["status"]) == (507, 507)
        assert _files(folder) == {f"{batch['id']}/results.jsonl", f"{batch['id']}/errors.jsonl"}


def test_what_ended_long_ago_is_forgotten(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A batch goes with its results when its time has passed, and so do files of none."""
    monkeypatch.setattr(batches, "SWEEPING", 0.05)
    with _service(models, folder, results_ttl=1e-9) as client:
        (folder / ("a" * 32)).mkdir()
        (folder / ("a" * 32) / "upload").write_bytes(b"left by a process that was killed")
        batch = _submit(client, _npz(images=IMAGES[:1], masks=None, truths=None))
        while client.get(f"/v1/batches/{batch['id']}").status_code != 404:
            threading.Event().wait(0.05)

        monkeypatch.setattr(batches, "UPLOADING", 0.0)  # nobody places files any more

        while _files(folder):
            threading.Event().wait(0.05)


def test_files_of_a_batch_to_come_stay(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """What nobody knows yet may be on its way, and whatever fails the looks go on."""
    sweep, looks = batches.Batches.sweep, threading.Semaphore(0)
    failures: list[Exception] = [ConnectionError("none of OSError's"), RuntimeError("any")]

    async def counted(self: batches.Batches) -> None:
        if failures:
            raise failures.pop()
        await sweep(self)
        looks.release()

    monkeypatch.setattr(batches, "SWEEPING", 0.01)
    monkeypatch.setattr(batches.Batches, "sweep", counted)
    with _service(models, folder):
        (folder / ("a" * 32)).mkdir()
        (folder / ("a" * 32) / "upload").write_bytes(b"half of it")
        for _ in range(4):
            looks.acquire()

        assert _files(folder) == {f"{'a' * 32}/upload"}


def test_a_batch_keeps_its_model(models: Path, folder: Path):
    """What was handed in for one model is done by it, though another has taken its name."""
    with _service(models, folder, work=False) as client:
        batch = _submit(client, _npz(), operation="log-likelihood")
        body = {
            "images": [{"image": text(npy(IMAGES[3])), "mask": text(npy(MASKS[3]))}],
            "particles": 64,
            "quality": "fast",
        }
    write_checkpoint(models, seed=1)

    with _service(models, folder) as client:
        _ended(client, batch)
        line = _lines(client, batch)[3]
        other = client.post("/v1/log-likelihood", json={**body, "seed": line["seed"]}).json()
    write_checkpoint(models, seed=0)
    with _service(models, folder) as client:
        same = client.post("/v1/log-likelihood", json={**body, "seed": line["seed"]}).json()

    assert line["log_likelihood"] == same["results"][0]["log_likelihood"]
    assert line["log_likelihood"] != other["results"][0]["log_likelihood"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        EndpointConnectionError(endpoint_url="http://bucket"),
    ],
    ids=["full", "away"],
)
def test_what_cannot_be_written_is_waited_for(
    failure: Exception, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    """While results find no place the state says so; when they do, the batch is done."""
    full = threading.Event()
    full.set()
    place = Store.place

    def placed(store: Store, path: Path, name: str) -> None:
        if "/results/" in name and full.is_set():
            raise failure
        place(store, path, name)

    monkeypatch.setattr(Store, "place", placed)
    batch = _submit(client, _npz())

    while (told := client.get(f"/v1/batches/{batch['id']}").json())["problem"] is None:
        threading.Event().wait(0.05)
    full.clear()

    assert told["state"] == "running"
    assert str(failure) in told["problem"]
    assert _ended(client, batch)["done"] == COUNT


def test_where_files_cannot_be_reached_nothing_is_taken_in(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    """A bucket that is away is no fault of the batch, which may be sent again."""

    def away(_store: Store) -> int:
        raise EndpointConnectionError(endpoint_url="http://bucket")

    monkeypatch.setattr(Store, "size", away)

    answer = client.post("/v1/batches", params={"operation": "impute"}, content=_npz())

    assert answer.status_code == 503
    assert "cannot be reached" in answer.json()["detail"]
    assert int(answer.headers["Retry-After"]) > 0


def test_a_file_that_ends_the_process_again_and_again_is_given_up(
    models: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nobody else's batches have to wait for one that takes all memory each time."""
    monkeypatch.setattr(worker, "MOST_ATTEMPTS", 3)
    with _service(models, folder, work=False) as client:
        batch = _submit(client, _npz())
    (work,) = (folder / batch["id"]).iterdir()
    for number in range(3):  # as processes leave them that were killed
        (work / "attempts").mkdir(exist_ok=True)
        (work / "attempts" / str(number)).touch()

    with _service(models, folder) as client:
        ended = _ended(client, batch, state="failed")
        other = _ended(client, _submit(client, _npz(), key="other"))

    assert "3 times the process ended" in ended["problem"]
    assert other["done"] == COUNT


def test_a_stopped_service_goes_on_where_it_was(models: Path, folder: Path):
    """What was not done when a service stopped is done by the next one; results are the same."""
    with _service(models, folder) as client:
        whole = _submit(client, _npz(), particles=640)
        _ended(client, whole)
        expected = client.get(f"/v1/batches/{whole['id']}/results").content
        batch = _submit(client, _npz(), particles=640, key="again")
        while client.get(f"/v1/batches/{batch['id']}").json()["done"] < 3:
            threading.Event().wait(0.01)

    with _service(models, folder) as client:
        _ended(client, batch)
        assert client.get(f"/v1/batches/{batch['id']}/results").content == expected


def test_an_upload_that_breaks_off_leaves_nothing(client: httpx.Client, folder: Path):
    """A client that leaves in the middle of its file has no batch, and its bytes are gone."""
    url = client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(
            b"POST /v1/batches?operation=impute HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: 10000000\r\n\r\n" + bytes(3_000_000)
        )
        while not _files(folder):
            threading.Event().wait(0.01)

    while _files(folder):
        threading.Event().wait(0.01)
    assert client.get("/v1/batches").json()["batches"] == []


def test_requests_and_batches_do_not_mix(client: httpx.Client):
    """While a batch is worked on, requests have the answers that they have alone."""
    body = {"images": [{"image": text(npy(IMAGES[0])), "mask": text(npy(MASKS[0]))}], "seed": 1}
    alone = client.post("/v1/impute", json=body).json()
    batch = _submit(client, _npz(), particles=6400)

    answers = [client.post("/v1/impute", json=body).json() for _ in range(5)]

    assert answers == [alone] * 5
    assert _ended(client, batch)["done"] == COUNT


def test_a_service_may_take_no_batches(models: Path):
    """Without a folder there are no such routes, and nothing is written."""
    with serving(create_app(settings_for(models, batches=""))) as address:
        assert httpx.get(f"{address}/v1/batches").status_code == 404
