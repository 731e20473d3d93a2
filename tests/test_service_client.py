"""The client of batches, against a real service and connections that break."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import client
from service.app import create_app
from service.client import Batch, Client, Problem, Unreachable
from tests.wire import random_levels, random_mask, serving, settings_for

pytestmark = pytest.mark.usefixtures("small_chunks")
COUNT = 12
IMAGES = np.stack([random_levels(seed) for seed in range(COUNT)])
MASKS = np.stack([random_mask(seed) for seed in range(COUNT)])
ASKED: dict[str, Any] = {"operation": "impute", "particles": 64, "quality": "fast", "seed": 5}
Fault = Callable[[httpx.Response], httpx.Response]


@pytest.fixture
def address(models: Path, tmp_path: Path) -> Iterator[str]:
    """That of a service with a tiny model."""
    settings = settings_for(models, batches=str(tmp_path / "batches"))
    with serving(create_app(settings)) as address:
        yield address


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Images with masks, of which one can be worked on by nobody."""
    path = tmp_path / "images.npz"
    images = IMAGES.astype(np.float32) / 255
    images[4] = 7
    np.savez(path, images=images, masks=MASKS)
    return path


class Faulty(httpx.BaseTransport):
    """Real connections, whose first answers are spoilt."""

    def __init__(self, *faults: Fault) -> None:
        self._inner, self._faults = httpx.HTTPTransport(), list(faults)
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The service's answer, or what is left of it."""
        self.requests.append(request)
        answer = self._inner.handle_request(request)
        return self._faults.pop(0)(answer) if self._faults else answer

    def close(self) -> None:
        """Closes the connections."""
        self._inner.close()


def _lost(answer: httpx.Response) -> httpx.Response:
    answer.read()
    answer.close()
    raise httpx.ReadError("the connection is gone")


def _busy(answer: httpx.Response) -> httpx.Response:
    answer.close()
    return httpx.Response(503, headers={"Retry-After": "1"})


def _without_service(answer: httpx.Response) -> httpx.Response:
    answer.close()
    return httpx.Response(502)


class _Cut(httpx.SyncByteStream):
    """The first bytes of an answer, and then no more."""

    def __init__(self, answer: httpx.Response, most: int) -> None:
        self._answer, self._most = answer, most

    def __iter__(self) -> Iterator[bytes]:
        yield self._answer.read()[: self._most]
        raise httpx.ReadError("the connection is gone")

    def close(self) -> None:
        """Closes the answer that was cut."""
        self._answer.close()


def _cut(most: int, **changed: str) -> Fault:
    def fault(answer: httpx.Response) -> httpx.Response:
        headers = {**answer.headers, **changed}
        return httpx.Response(answer.status_code, headers=headers, stream=_Cut(answer, most))

    return fault


def _done(service: Client, file: Path) -> Batch:
    batch = service.submit(file, **ASKED)
    *_, batch = service.watch(batch.id, every=0.02)
    assert batch.state == "done"
    return batch


def test_a_batch_from_its_file_to_its_results(address: str, file: Path, tmp_path: Path):
    """What is handed in can be watched, found, fetched with its errors, and forgotten."""
    results, errors = tmp_path / "results.jsonl", tmp_path / "errors.jsonl"
    with Client(address) as service:
        batch = _done(service, file)
        service.results(batch.id, results)
        service.errors(batch.id, errors)
        listed = service.states()
        service.delete(batch.id)
        left = service.states()

    assert (batch.total, batch.done, batch.failed) == (COUNT, COUNT - 1, 1)
    assert batch.finished_at is not None
    assert batch.created_at <= batch.finished_at
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["index"] for line in lines] == [i for i in range(COUNT) if i != 4]
    assert [json.loads(line)["index"] for line in errors.read_text().splitlines()] == [4]
    assert (listed, left) == ([batch], [])
    assert not list(tmp_path.glob("*.part"))


def test_a_cancelled_batch_has_no_results(address: str, file: Path, tmp_path: Path):
    """What the service does not do is raised with its sentence, and no file is made."""
    with Client(address) as service:
        batch = service.submit(file, **(ASKED | dict[str, Any](particles=1_000_000)))
        service.cancel(batch.id)
        *_, batch = service.watch(batch.id, every=0.02)
        with pytest.raises(Problem) as refused:
            service.results(batch.id, tmp_path / "results.jsonl")

    assert batch.state == "cancelled"
    assert refused.value.status == 409
    assert str(refused.value) == "Expected a batch that is done; got one that is cancelled."
    assert not (tmp_path / "results.jsonl").exists()


def test_a_refusal_names_the_field(address: str, file: Path):
    """An option that cannot be is a problem with the field, what was expected and what came."""
    with Client(address) as service, pytest.raises(Problem) as refused:
        service.submit(file, operation="impute", particles=0)

    assert (refused.value.status, refused.value.type) == (422, "urn:miss-iwem:problem:bad-input")
    assert refused.value.errors[0]["field"] == "particles"


def test_a_batch_is_handed_in_once_over_connections_that_break(address: str, file: Path):
    """Where an answer is lost or the service busy, it is sent again whole with the same key."""
    transport = Faulty(_lost, _busy, _without_service, _lost)
    with Client(address, transport=transport) as service:
        batch = service.submit(file, **ASKED)

        assert [each.id for each in service.states()] == [batch.id]
        assert len({sent.headers["Idempotency-Key"] for sent in transport.requests[:5]}) == 1
        assert batch.bytes == file.stat().st_size
        *_, _ended = service.watch(batch.id, every=0.02)


def test_the_service_says_when_to_come_again(
    address: str, file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Retry-After is kept to, and a sentence comes even of something that is not the service."""
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)

    with Client(address, tries=2, transport=Faulty(_busy, _busy)) as service:
        with pytest.raises(Problem, match="got the status 503 of something else"):
            service.states()
        assert service.states() == []

    assert pauses == [1.0]


def test_a_deletion_whose_answer_was_lost_is_one(address: str, file: Path):
    """What is gone when it is tried again has been deleted; what never was is not found."""
    with Client(address) as service:
        batch = _done(service, file)
    with Client(address, transport=Faulty(_lost)) as service:
        service.delete(batch.id)
        with pytest.raises(Problem) as unknown:
            service.delete(batch.id)

    assert unknown.value.status == 404


def test_a_download_goes_on_where_it_broke_off(address: str, file: Path, tmp_path: Path):
    """However often it breaks, the rest is asked for, of the same file, and the bytes are its."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    transport = Faulty(*[_cut(100)] * 8)
    with Client(address) as service:
        batch = _done(service, file)
        service.results(batch.id, whole)
    with Client(address, tries=2, transport=transport) as service:
        service.results(batch.id, broken)

    assert broken.read_bytes() == whole.read_bytes()
    ranges = [sent.headers.get("Range") for sent in transport.requests]
    assert ranges == [None, *(f"bytes={100 * sent}-" for sent in range(1, 9))]
    assert all(sent.headers["If-Range"] for sent in transport.requests[1:])
    assert not list(tmp_path.glob("*.part"))


def test_a_download_of_a_file_that_changed_begins_anew(address: str, file: Path, tmp_path: Path):
    """The beginning of another file is not kept."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Client(address) as service:
        batch = _done(service, file)
        service.results(batch.id, whole)
    with Client(address, transport=Faulty(_cut(100, etag='"another"'))) as service:
        service.results(batch.id, broken)

    assert broken.read_bytes() == whole.read_bytes()


def test_where_there_is_no_service_it_says_so():
    """After a few tries the address is named."""
    sentence = r"Expected a service at http://127\.0\.0\.1:9; got"
    with (
        Client("http://127.0.0.1:9", tries=2) as service,
        pytest.raises(Unreachable, match=sentence),
    ):
        service.states()


def test_a_file_that_is_not_there_is_not_tried_again(address: str, tmp_path: Path):
    """It fails as any file does."""
    with Client(address) as service, pytest.raises(FileNotFoundError):
        service.submit(tmp_path / "nothing.npz", operation="impute")


def test_a_large_file_is_not_held_in_memory(address: str, tmp_path: Path):
    """It goes in pieces, and the service is told how long it is."""
    out = io.BytesIO()
    np.save(out, np.zeros((20_000, 6, 5), np.uint8))
    path = tmp_path / "large.npy"
    path.write_bytes(out.getvalue())
    transport = Faulty()
    with Client(address, transport=transport) as service:
        batch = service.submit(path, **ASKED)
        service.cancel(batch.id)

    sent = transport.requests[0]
    assert int(sent.headers["Content-Length"]) == path.stat().st_size
    with pytest.raises(httpx.RequestNotRead):
        _ = sent.content
