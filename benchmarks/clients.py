"""What the benchmarks ask of a service, and how: requests, loads, and a service to load."""

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import torch
from PIL import Image
from rich.console import Console

from model.masks import mechanism
from model.noise import Noise

__all__ = [
    "CLIENT",
    "SERVER",
    "Answer",
    "Load",
    "arriving",
    "ask",
    "begin",
    "bodies",
    "contents",
    "free_port",
    "measure",
    "running",
    "say",
    "serve_command",
    "session",
    "until_ready",
]

SERVER, CLIENT = 0, 1
"""The processors of the services and of the requests."""
LIMIT = 600.0
STARTING = 60.0
say = Console(highlight=False).print


def measure(
    options: argparse.ArgumentParser, parts: Mapping[str, Callable[[argparse.Namespace], None]]
) -> None:
    """Measures the parts that the command line asks for, with the model that it names."""
    options.add_argument(
        "checkpoint", type=Path, nargs="?", default=Path("checkpoints/static-mnist-miss-iwem")
    )
    options.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    said = options.parse_args()
    for name in said.only:
        say(f"[bold]{name}")
        parts[name](said)


def bodies(
    count: int, particles: int | Sequence[int], quality: str = "standard"
) -> list[dict[str, Any]]:
    """Requests of different images; strokes where a digit might be, and three patches missing."""
    generator = Noise(0).generator()
    seen = mechanism("patches:3")(count, (1, 28, 28), generator)
    values = torch.rand(count, 4, 4, generator=generator)
    values = torch.nn.functional.interpolate(values[:, None], 20, mode="bilinear") > 0.6  # noqa: PLR2004
    values = torch.nn.functional.pad(values.to(torch.uint8), (4, 4, 4, 4))
    each_has = [particles] * count if isinstance(particles, int) else particles
    return [
        {
            "images": [
                {"image": _png(255 * value[0].numpy()), "mask": _png(255 * ~each[0].numpy())}
            ],
            "particles": each_has[index],
            "quality": quality,
            "seed": index,
        }
        for index, (value, each) in enumerate(zip(values, seen, strict=True))
    ]


def _png(levels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    seconds: float
    status: int
    headers: Mapping[str, str]
    body: bytes
    at: float
    """When it was there; of time.perf_counter()."""


@dataclass(frozen=True)
class Load:
    """What came of many."""

    answers: list[Answer]
    started: float
    seconds: float

    def within(self, seconds: float) -> "Load":
        """What came in the first seconds."""
        came = [answer for answer in self.answers if answer.at < self.started + seconds]
        return Load(came, self.started, seconds)

    @property
    def good(self) -> list[Answer]:
        """Those with results."""
        return [answer for answer in self.answers if answer.status == HTTPStatus.OK]

    @property
    def rate(self) -> float:
        """Results a second."""
        return len(self.good) / self.seconds

    def quantile(self, level: float) -> float:
        """Of the time that a result took, in milliseconds."""
        return 1000 * float(np.quantile([answer.seconds for answer in self.good], level))

    @classmethod
    def closed(
        cls, url: str, asked: Sequence[dict[str, Any]], *, connections: int, seconds: float
    ) -> "Load":
        """Of connections that ask again as soon as they have their answer."""
        return asyncio.run(_closed(url, contents(asked), connections, seconds))

    @classmethod
    def opened(
        cls, url: str, asked: Sequence[dict[str, Any]], *, rate: float, seconds: float
    ) -> "Load":
        """Of requests that come by chance, so many a second, whether answers come or not."""
        return asyncio.run(_opened(url, contents(asked), rate, seconds))


def contents(asked: Sequence[dict[str, Any]]) -> list[bytes]:
    """The requests as they are sent."""
    return [json.dumps(body).encode() for body in asked]


def session() -> aiohttp.ClientSession:
    """As many connections as are asked for."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(LIMIT),
        headers={"content-type": "application/json"},
    )


async def ask(
    client: aiohttp.ClientSession, url: str, content: bytes, *, since: float | None = None
) -> Answer:
    """The answer, and the time until it was there."""
    begun = time.perf_counter() if since is None else since
    async with client.post(url, data=content) as answer:
        body = await answer.read()
        there = time.perf_counter()
        return Answer(there - begun, answer.status, answer.headers, body, there)


async def _closed(url: str, ready: list[bytes], connections: int, seconds: float) -> Load:
    answers: list[Answer] = []
    async with session() as client:
        started = time.perf_counter()

        async def again_and_again(first: int) -> None:
            index = first
            while time.perf_counter() - started < seconds:
                answers.append(await ask(client, url, ready[index % len(ready)]))
                index += connections

        await asyncio.gather(*(again_and_again(first) for first in range(connections)))
        return Load(answers, started, time.perf_counter() - started)


async def _opened(url: str, ready: list[bytes], rate: float, seconds: float) -> Load:
    async with session() as client:
        return await arriving(client, url, ready, rate=rate, seconds=seconds)


async def arriving(
    client: aiohttp.ClientSession, url: str, ready: list[bytes], *, rate: float, seconds: float
) -> Load:
    """What came of requests that come by chance, after the last of them."""
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))
    requests: list[asyncio.Task[Answer]] = []
    started = time.perf_counter()
    for index, at in enumerate(started + np.cumsum(gaps)):
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        content = ready[index % len(ready)]
        requests.append(asyncio.create_task(ask(client, url, content, since=at)))
    answers = await asyncio.gather(*requests)
    return Load(list(answers), started, time.perf_counter() - started)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until_ready(url: str, process: subprocess.Popen[str]) -> None:
    """Waits for a good answer, as long as the process runs."""
    end = time.monotonic() + STARTING
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=1.0).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"Expected an answer of {url}; got none.")


def serve_command(
    checkpoint: Path, port: int, **settings: Any
) -> tuple[list[str], dict[str, str]]:
    """The service of this model, with one thread for it: the command and its environment."""
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), "--threads", "1"]
    told = {"checkpoints": checkpoint.parent, "model": checkpoint.name, "batches": "", **settings}
    variables = {f"MISS_IWEM_{name.upper()}": str(value) for name, value in told.items()}
    return command, {**os.environ, **variables}


def begin(
    words: list[str], environment: dict[str, str], processors: str = f"{SERVER},{CLIENT}"
) -> subprocess.Popen[str]:
    """A silent process on these processors."""
    return subprocess.Popen(
        ["taskset", "--cpu-list", processors, *words],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def running(checkpoint: Path, **settings: Any) -> Generator[tuple[str, int]]:
    """A service on both processors: where, and its pid."""
    port = free_port()
    command, environment = serve_command(checkpoint, port, **settings)
    process = begin(command, environment)
    try:
        url = f"http://127.0.0.1:{port}"
        until_ready(f"{url}/health/ready", process)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
