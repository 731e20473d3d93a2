"""What batches cost, and what they cost requests; ratios of what is measured side by side.

    python benchmarks/batches.py [checkpoints/static-mnist-miss-iwem] [--only throughput …]
        [--images 70000] [--rounds 3] [--kills 100] [--bytes 2000000000]
        [--database postgresql://…]

- `throughput`: images of MNIST scored (K = 100) as a batch, and by the library in a loop without a
  service, 16 images together; on one processor, by turns of some seconds;
- `beside`: what a lone request takes while a batch is worked on, and otherwise;
- `memory`: the most that the service has had after a small batch and after one of so many bytes;
- `workers`: the rate of two workers with one thread each, and of one; it needs PostgreSQL, whose
  transactions are counted. Beside it that of two such loops at once and of one: what the
  processors allow;
- `kills`: processes are killed at random times, so many times, while one batch is worked on: the
  service with SQLite, and with PostgreSQL two workers and the service. The results are then
  compared with those of a batch that was left in peace.
"""

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import torch
from clients import (
    CLIENT,
    SERVER,
    Load,
    begin,
    bodies,
    free_port,
    measure,
    say,
    serve_command,
    until_ready,
)

from model import data
from model.stages import finish
from service import schemas
from service.models import Models
from service.operations import LogLikelihood, read
from service.work import Score

ASKED = {"operation": "log-likelihood", "particles": "100", "seed": "1"}
TOGETHER, TURN = 16, 5.0
DONE = object()


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--images", type=int, default=70_000)
    options.add_argument("--bytes", type=int, default=2 * 10**9)
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quality", default="standard")
    options.add_argument("--database", default="", help="An empty one of PostgreSQL's.")
    measure(options, PARTS)


def _images(count: int) -> np.ndarray:
    """Of MNIST, its test set and then its training set."""
    found = data.load("mnist")
    pixels = torch.cat([found.test.pixels, found.train.pixels, found.validation.pixels])
    return pixels[:count, 0].numpy()


def _file(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


@contextmanager
def _process(
    words: list[str], environment: dict[str, str], processors: str
) -> Generator[subprocess.Popen[str]]:
    process = begin(words, environment, processors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _service(
    checkpoint: Path, folder: Path, processors: str, **settings: Any
) -> Generator[tuple[str, subprocess.Popen[str]]]:
    port = free_port()
    words, environment = serve_command(checkpoint, port, batches=folder, **settings)
    with _process(words, environment, processors) as process:
        until_ready(f"http://127.0.0.1:{port}/health/ready", process)
        yield f"http://127.0.0.1:{port}", process


def _submit(url: str, content: Any, **options: str) -> str:
    answer = httpx.post(
        f"{url}/v1/batches", params={**ASKED, **options}, content=content, timeout=None
    )
    answer.raise_for_status()
    return url + answer.headers["Location"]


def _state(address: str) -> dict[str, Any]:
    return httpx.get(address, timeout=60).raise_for_status().json()


def _wait(address: str) -> dict[str, Any]:
    while (told := _state(address))["finished_at"] is None:
        time.sleep(0.25)
    if told["state"] != "done":
        raise SystemExit(f"Expected a batch that is done; got {told}.")
    return told


def _throughput(said: argparse.Namespace) -> None:
    images = _images(said.images)
    content = _file(images=images)
    ratios: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        _service(said.checkpoint, Path(folder), str(SERVER)) as (url, process),
    ):
        for number in range(said.rounds):
            started = time.perf_counter()
            address = _submit(url, content, quality=said.quality)
            batch, loop = time.perf_counter() - started, 0.0
            rest, ended = _loop(said, images), False
            while rest is not None or not ended:
                process.send_signal(signal.SIGSTOP)
                seconds, rest = _turn(rest)
                process.send_signal(signal.SIGCONT)
                loop, started = loop + seconds, time.perf_counter()
                while not ended and time.perf_counter() < started + TURN:
                    ended = _state(address)["finished_at"] is not None
                    time.sleep(0 if ended else 0.1)
                batch += time.perf_counter() - started
            _wait(address)
            ratios.append(batch / loop)
            say(f"round {number + 1}: batch {batch:.1f} s, loop {loop:.1f} s, {ratios[-1]:.3f}")
    say(f"{len(images)} images, {said.quality}: {np.median(ratios):.3f} times the loop (median)")


def _turn(work: Iterator[None] | None) -> tuple[float, Iterator[None] | None]:
    """Seconds of a turn of some work, and what is left of it."""
    started = time.perf_counter()
    os.sched_setaffinity(0, {SERVER})
    while work is not None and time.perf_counter() < started + TURN:
        work = None if next(work, DONE) is DONE else work
    os.sched_setaffinity(0, {CLIENT})
    return time.perf_counter() - started, work


def _loop(said: argparse.Namespace, images: np.ndarray) -> Iterator[None]:
    """The same by the library, some images at a time, from these in memory to the numbers."""
    torch.set_num_threads(1)
    model = Models(said.checkpoint.parent, device="cpu").get(said.checkpoint.name)
    options = schemas.LogLikelihoodOptions(
        particles=int(ASKED["particles"]), quality=said.quality, seed=int(ASKED["seed"])
    )
    operation = LogLikelihood(options, model, int(ASKED["seed"]))
    shape = model.card.architecture.image_shape
    for first in range(0, len(images), TOGETHER):
        some = images[first : first + TOGETHER]
        pictures = [read(_npy(image), None, None, shape) for image in some]
        jobs = [operation.job(first + index, each) for index, each in enumerate(pictures)]
        with torch.inference_mode():
            finish(Score.together(jobs))
        yield


def _alone(said: argparse.Namespace, images: np.ndarray, processor: int) -> float:
    """Seconds that such a loop takes on this processor."""
    os.sched_setaffinity(0, {processor})
    loop = _loop(said, images)
    next(loop)  # the model is read
    started = time.perf_counter()
    for _ in loop:
        pass
    return time.perf_counter() - started


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _beside(said: argparse.Namespace) -> None:
    content = _file(images=_images(said.images))
    with (
        tempfile.TemporaryDirectory() as folder,
        _service(said.checkpoint, Path(folder), f"{SERVER},{CLIENT}") as (url, _),
    ):
        for particles in (64, 1000):
            asked = bodies(64, particles)
            measured: dict[str, list[Load]] = {"alone": [], "beside": []}
            for _ in range(said.rounds):
                for name, loads in measured.items():
                    address = _submit(url, content, quality="standard") if name != "alone" else ""
                    while address and not _state(address)["done"]:
                        time.sleep(0.25)
                    loads.append(
                        Load.closed(f"{url}/v1/impute", asked, connections=1, seconds=8.0)
                    )
                    if address:
                        httpx.post(f"{address}/cancel", timeout=60)
                        time.sleep(3.0)
            for level in (0.5, 0.99):
                alone, beside = (
                    float(np.median([load.quantile(level) for load in loads]))
                    for loads in measured.values()
                )
                say(
                    f"K = {particles}, quantile {level}: alone {alone:.1f} ms, beside a batch "
                    f"{beside:.1f} ms, {beside / alone:.2f} times"
                )


def _memory(said: argparse.Namespace) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        _service(
            said.checkpoint, Path(folder), f"{SERVER},{CLIENT}", max_batch=2 * said.bytes
        ) as (
            url,
            process,
        ),
    ):
        for size in (said.bytes // 100, said.bytes):
            count = size // (28 * 28 * 8)
            path = Path(folder) / "huge.npy"
            images = np.lib.format.open_memmap(path, "w+", np.float64, (count, 28, 28))
            images[:] = 0.5
            some = _images(min(count, 1000)) / 255
            images[: len(some)] = some
            images.flush()
            del images
            started = time.perf_counter()
            with path.open("rb") as file:
                told = _wait(_submit(url, file, quality="fast", particles="1"))
            say(
                f"{size / 1e6:.0f} MB, {told['done']} images in "
                f"{time.perf_counter() - started:.0f} s: the service has had at most "
                f"{_most(process.pid):.0f} MB"
            )


def _most(process: int) -> float:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"Expected the memory of process {process}; got none.")


def _worker(said: argparse.Namespace, folder: Path, processor: int) -> Any:
    environment = {
        **os.environ,
        "MISS_IWEM_BATCHES": str(folder),
        "MISS_IWEM_DATABASE": said.database,
        "MISS_IWEM_THREADS": "1",
    }
    return _process([sys.executable, "-m", "service", "worker"], environment, str(processor))


def _workers(said: argparse.Namespace) -> None:
    if not said.database:
        say("not measured: no --database")
        return
    content = _file(images=_images(said.images))
    ratios: dict[str, list[float]] = {"workers": [], "loops": []}
    for _ in range(said.rounds):
        one, two = (_together(said, content, each) for each in ((SERVER,), (SERVER, CLIENT)))
        ratios["workers"].append(two / one)
        one, two = (_loops(said, each) for each in ((SERVER,), (SERVER, CLIENT)))
        ratios["loops"].append(two / one)
    for name, found in ratios.items():
        say(f"two {name}: {np.median(found):.2f} times one (median)")


def _together(said: argparse.Namespace, content: bytes, processors: Sequence[int]) -> float:
    """Images a second of workers that share a database, one on each of the processors."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path, everywhere = Path(folder), f"{SERVER},{CLIENT}"
        service = _service(said.checkpoint, path, everywhere, database=said.database, work=False)
        url, _ = stack.enter_context(service)
        for processor in processors:
            stack.enter_context(_worker(said, path, processor))
        begun, started = _transactions(said.database), time.perf_counter()
        rate = _wait(_submit(url, content, quality="standard"))["rate"]
        made = _transactions(said.database) - begun
    each_second = made / (time.perf_counter() - started)
    say(f"{len(processors)} workers: {rate:.1f} images/s, {each_second:.0f} transactions/s")
    return rate


def _transactions(database: str) -> int:
    """How many a database has ended."""
    asked = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    with psycopg.connect(database) as connection:
        (found,) = connection.execute(asked).fetchone() or (0,)
    return found


def _loops(said: argparse.Namespace, processors: Sequence[int]) -> float:
    """Images a second of loops that run at once, one on each of the processors."""
    share = np.array_split(_images(said.images), len(processors))
    with ProcessPoolExecutor(len(processors), get_context("spawn")) as pool:
        seconds = list(pool.map(_alone, [said] * len(processors), share, processors))
    rate = sum(len(some) / taken for some, taken in zip(share, seconds, strict=True))
    say(f"{len(processors)} loops: {rate:.1f} images/s")
    return rate


def _kills(said: argparse.Namespace) -> None:
    content = _file(images=_images(said.images))
    with (
        tempfile.TemporaryDirectory() as folder,
        _service(said.checkpoint, Path(folder), f"{SERVER},{CLIENT}") as (url, _),
    ):
        address = _submit(url, content, quality=said.quality)
        _wait(address)
        expected = httpx.get(f"{address}/results", timeout=60).content
    for database in ("", said.database)[: 2 if said.database else 1]:
        with tempfile.TemporaryDirectory() as folder:
            Killing(said, Path(folder), database).compare(content, expected)


class Killing:
    """Processes that are begun again as often as they are killed."""

    def __init__(self, said: argparse.Namespace, folder: Path, database: str) -> None:
        self._kills, self._chance = said.kills, random.Random(0)
        self._quality = said.quality
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        words, environment = serve_command(
            said.checkpoint, self._port, batches=folder, database=database, work=not database
        )
        worker = [sys.executable, "-m", "service", "worker"]
        self._commands = [words, *([worker] * 2 if database else [])]
        self._environment = {**environment, "MISS_IWEM_THREADS": "1"}
        self._name = "PostgreSQL, two workers" if database else "SQLite"

    def compare(self, content: bytes, expected: bytes) -> None:
        """Says whether the results are those of a batch that was left in peace."""
        processes = [self._start(words) for words in self._commands]
        try:
            until_ready(f"{self._url}/health/ready", processes[0])
            address = _submit(self._url, content, quality=self._quality)
            started, killed = time.perf_counter(), 0
            while killed < self._kills:
                time.sleep(self._chance.uniform(0.5, 8.0))
                if self._done(address):
                    break
                chosen = self._chance.randrange(len(processes))
                processes[chosen].kill()
                processes[chosen].wait()
                processes[chosen] = self._start(self._commands[chosen])
                killed += 1
            until_ready(f"{self._url}/health/ready", processes[0])
            told = _wait(address)
            results = httpx.get(f"{address}/results", timeout=60).content
        finally:
            for process in processes:
                process.kill()
                process.wait()
        say(
            f"{self._name}: killed {killed} times in {time.perf_counter() - started:.0f} s, "
            f"{told['done']} results, {told['failed']} failed; "
            f"{'the same bytes' if results == expected else 'OTHER BYTES'}"
        )

    def _done(self, address: str) -> bool:
        try:
            return _state(address)["finished_at"] is not None
        except httpx.HTTPError:
            return False

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        return begin(words, self._environment)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "throughput": _throughput,
    "beside": _beside,
    "memory": _memory,
    "workers": _workers,
    "kills": _kills,
}

if __name__ == "__main__":
    main()
