"""What the service adds to its model, beside other ways to serve the same weights.

    python benchmarks/serving.py [checkpoints/static-mnist-miss-iwem] [--quality standard]
        [--operations impute log-likelihood] [--particles 64 1000 10000]
        [--connections 1 8 64] [--seconds 4] [--rounds 5]

Four sides complete or score images with holes, one image a request, with the same weights and
options:

- `bare`: the library in a loop, without HTTP: the limit;
- `service`: this service;
- `inline`: a plain FastAPI endpoint that calls the library where it stands;
- `litserve`: LitServe, which collects up to 16 requests and calls the library with all of them.

Every side has one thread for the model and the same processor for all its processes; the requests
come from another processor. The sides take turns, the others stand still meanwhile, and medians
over the rounds are given. Connections ask again as soon as they have their answer; then, in an
open loop, requests come by chance at 0.7 of the service's rate, whether answers come or not.
"""

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import litserve
import torch
import uvicorn
from clients import (
    CLIENT,
    SERVER,
    Answer,
    Load,
    bodies,
    free_port,
    serve_command,
    until_ready,
)
from fastapi import FastAPI, Request
from rich.console import Console
from rich.table import Table

from model import checkpoint
from model.estimators import QUALITIES
from model.imputation import Completions, impute
from model.likelihood import Scores, score
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage
from model.stages import Stages, finish
from service import codec

PICTURES, TOGETHER = 64, 16


def main() -> None:
    """Measures and prints, or is one of the sides."""
    options = argparse.ArgumentParser()
    options.add_argument(
        "checkpoint", type=Path, nargs="?", default=Path("checkpoints/static-mnist-miss-iwem")
    )
    options.add_argument("--quality", default="standard", choices=QUALITIES)
    options.add_argument("--operations", nargs="+", choices=WORK, default=list(WORK))
    options.add_argument("--particles", type=int, nargs="+", default=[64, 1000, 10_000])
    options.add_argument("--connections", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--side", choices=[*SERVERS, "bare"])
    options.add_argument("--port", type=int)
    said = options.parse_args()
    if said.side is None:
        _compare(said)
        return
    os.sched_setaffinity(0, {SERVER})
    torch.set_num_threads(1)
    if said.side == "bare":
        _bare(said.checkpoint)
    else:
        SERVERS[said.side](said.checkpoint, said.port)


# The sides


@dataclass(frozen=True)
class Asked:
    """A request of any of the servers."""

    operation: str
    incomplete: Incomplete
    particles: int
    quality: str
    seed: int

    @classmethod
    def of(cls, operation: str, body: dict[str, Any]) -> "Asked":
        """The request that a body is."""
        (item,) = body["images"]
        picture = codec.read_picture(item["image"], item["mask"], (1, 28, 28), field="image")
        values = torch.from_numpy(picture.values > 0.5).float()[None]  # noqa: PLR2004
        observed = torch.from_numpy(~picture.missing).expand(values.shape)
        hidden = Incomplete.hide(values, observed)
        return cls(operation, hidden, body["particles"], body["quality"], body["seed"])


WORK: dict[str, Callable[..., Stages[Completions | Scores]]] = {
    "impute": impute,
    "log-likelihood": score,
}


class Worker:
    """The weights, and what is done with them."""

    def __init__(self, folder: Path) -> None:
        self.model = checkpoint.read(folder).model

    def work(self, asked: Sequence[Asked]) -> Completions | Scores:
        """What comes of requests that differ in their images and seeds alone."""
        images = Incomplete(
            torch.cat([each.incomplete.values for each in asked]),
            torch.cat([each.incomplete.observed for each in asked]),
        )
        noise = NoisePerImage(tuple(Noise(each.seed) for each in asked))
        with torch.inference_mode():
            return finish(
                WORK[asked[0].operation](
                    self.model,
                    images,
                    noise,
                    particles=asked[0].particles,
                    proposal=QUALITIES[asked[0].quality].proposal,
                )
            )


def _answer(done: Completions | Scores, index: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"log_likelihood": done.log_likelihood.value[index].item()}
    if isinstance(done, Completions):
        arrays = {"mean": done.mean, "draw": done.draws[:, 0], "std": done.std}
        answer |= {name: codec.encode(each[index].numpy(), "png") for name, each in arrays.items()}
    return answer


def _bare(folder: Path) -> None:
    """Is told what to do and for how long; tells the seconds of all and of each image."""
    worker = Worker(folder)
    for line in sys.stdin:
        operation, particles, quality, seconds = json.loads(line)
        asked = [Asked.of(operation, body) for body in bodies(PICTURES, particles, quality)]
        done, started = 0, time.perf_counter()
        times: list[float] = []
        while time.perf_counter() - started < seconds:
            begun = time.perf_counter()
            worker.work(asked[done % PICTURES : done % PICTURES + 1])
            times.append(time.perf_counter() - begun)
            done += 1
        print(json.dumps([time.perf_counter() - started, times]), flush=True)


def _service(folder: Path, port: int) -> None:
    command, environment = serve_command(folder, port)
    os.execve(sys.executable, command, environment)


def _inline(folder: Path, port: int) -> None:
    app, worker = FastAPI(), Worker(folder)

    @app.post("/v1/{operation}")
    async def work(operation: str, request: Request) -> dict[str, Any]:
        return _answer(worker.work([Asked.of(operation, await request.json())]), 0)

    @app.get("/health/ready")
    async def ready() -> str:
        return "ok"

    uvicorn.run(app, port=port, log_level="error")


class Collecting(litserve.LitAPI):
    """What LitServe is told of the library."""

    def __init__(self, folder: Path, operation: str) -> None:
        path = f"/v1/{operation}"
        super().__init__(max_batch_size=TOGETHER, batch_timeout=0.005, api_path=path)
        self.folder, self.operation = folder, operation

    def setup(self, device: str) -> None:
        """Reads the weights in the process that works."""
        del device
        torch.set_num_threads(1)
        self.worker = Worker(self.folder)

    def decode_request(self, request: dict[str, Any], **_: Any) -> Asked:
        """A request."""
        return Asked.of(self.operation, request)

    def batch(self, inputs: list[Asked]) -> list[Asked]:
        """Requests as they are."""
        return inputs

    def predict(self, x: list[Asked], **_: Any) -> list[dict[str, Any]]:
        """The answers of all."""
        done = self.worker.work(x)
        return [_answer(done, index) for index in range(len(x))]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers as they are."""
        return output

    def encode_response(self, output: dict[str, Any], **_: Any) -> dict[str, Any]:
        """An answer as it is."""
        return output


def _litserve(folder: Path, port: int) -> None:
    server = litserve.LitServer(
        [Collecting(folder, operation) for operation in WORK],
        accelerator="cpu",
        healthcheck_path="/health/ready",
        timeout=False,
    )
    server.run(port=port, log_level="error", generate_client_file=False)


SERVERS: dict[str, Callable[[Path, int], None]] = {
    "service": _service,
    "inline": _inline,
    "litserve": _litserve,
}


# The comparison


@dataclass
class Side:
    """A process group that serves, and stands still where it has no turn."""

    name: str
    process: subprocess.Popen[str]
    url: str

    def measure(self, load: Callable[[str], Load]) -> Load:
        """What a load meets while this side alone runs."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            return load(self.url)
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def loop(self, *told: Any) -> Load:
        """What the bare loop does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps(told), file=self.process.stdin, flush=True)
        taken, times = json.loads(self.process.stdout.readline())
        os.killpg(self.process.pid, signal.SIGSTOP)
        ends = itertools.accumulate(times)
        answers = [
            Answer(each, HTTPStatus.OK, {}, b"", end)
            for each, end in zip(times, ends, strict=True)
        ]
        return Load(answers, 0.0, taken)


@contextmanager
def _sides(folder: Path) -> Generator[dict[str, Side]]:
    sides: dict[str, Side] = {}
    try:
        for name in ("bare", *SERVERS):
            port = free_port()
            command = [sys.executable, __file__, str(folder), "--side", name, "--port", str(port)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL if name in SERVERS else subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            sides[name] = Side(name, process, f"http://127.0.0.1:{port}/v1")
            if name in SERVERS:
                until_ready(f"http://127.0.0.1:{port}/health/ready", process)
                os.killpg(process.pid, signal.SIGSTOP)
        yield sides
    finally:
        for side in sides.values():
            os.killpg(side.process.pid, signal.SIGKILL)


def _compare(said: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {CLIENT})
    with _sides(said.checkpoint) as sides:
        for operation, particles in itertools.product(said.operations, said.particles):
            rate = math.nan
            for count in said.connections:
                rate = _close(sides, said, operation, particles, count)
            _opened(sides, said, operation, particles, 0.7 * rate)


def _close(
    sides: dict[str, Side], said: argparse.Namespace, operation: str, particles: int, count: int
) -> float:
    """Prints what so many connections meet; gives the service's rate."""
    asked = bodies(PICTURES, particles, said.quality)

    def load(side: Side) -> Load:
        if side.name == "bare":
            return side.loop(operation, particles, said.quality, said.seconds)
        return side.measure(
            lambda url: Load.closed(
                f"{url}/{operation}", asked, connections=count, seconds=said.seconds
            )
        )

    title = f"{operation}, {said.quality}, K = {particles}, {count} connections"
    return _in_turn(title, sides, load, said.rounds)["service"]


def _opened(
    sides: dict[str, Side], said: argparse.Namespace, operation: str, particles: int, rate: float
) -> None:
    """Prints what requests meet that come at this rate."""
    asked = bodies(PICTURES, particles, said.quality)

    def load(side: Side) -> Load:
        return side.measure(
            lambda url: Load.opened(f"{url}/{operation}", asked, rate=rate, seconds=said.seconds)
        )

    title = f"{operation}, {said.quality}, K = {particles}, {rate:.1f} a second by chance"
    servers = {name: side for name, side in sides.items() if name in SERVERS}
    _in_turn(title, servers, load, said.rounds)


def _in_turn(
    title: str, sides: dict[str, Side], load: Callable[[Side], Load], rounds: int
) -> dict[str, float]:
    """The median rates of the sides, which take turns."""
    found: dict[str, list[Load]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(load(side))
    rates = {name: statistics.median(one.rate for one in each) for name, each in found.items()}
    first = next(iter(rates))
    table = Table("", "answers/s", f"of {first}", "p50 ms", "p99 ms", title=title)
    for name, each in found.items():
        p50, p99 = (
            statistics.median(one.quantile(level) for one in each) for level in (0.5, 0.99)
        )
        table.add_row(
            name,
            f"{rates[name]:.1f}",
            f"{rates[name] / rates[first]:.2f}",
            f"{p50:.1f}",
            f"{p99:.1f}",
        )
    Console().print(table)
    return rates


if __name__ == "__main__":
    main()
