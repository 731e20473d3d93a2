"""What the service does under loads that it was not asked for.

    python benchmarks/load.py [checkpoints/static-mnist-miss-iwem] [--only crowd …]
        [--images 10000] [--seconds 60]

- `crowd`: so many different images at once, with 1 to 1000 particles; some clients leave and some
  requests are bad. Every answer is then compared with that of the same request alone;
- `neighbour`: what a small request waits while one of 1,000,000 particles is worked on;
- `overload`: ten times as many requests as can be answered, by chance;
- `memory`: the most that the process has had, after 1000 particles and after 1,000,000;
- `lone`: what the time of one request after another goes into, and that of empty ones, at once
  and after a pause as long as the arithmetic of a request.

The service has one thread for the model, as it has by default on two processors; the requests come
from the second of them, which does the service's HTTP besides. Under `overload` they give way to
it, as they would if they came from elsewhere.
"""

import argparse
import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
from clients import (
    CLIENT,
    Answer,
    Load,
    arriving,
    ask,
    bodies,
    contents,
    measure,
    running,
    say,
    session,
)

HUGE = 1_000_000
PICTURES = 64
BAD: list[dict[str, Any]] = [
    {"image": "no picture"},
    {"image": [[0.5]]},
    {"image": [[2.5] * 28] * 28},
]


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--images", type=int, default=10_000)
    options.add_argument("--seconds", type=float, default=60.0)
    os.sched_setaffinity(0, {CLIENT})
    measure(options, PARTS)


def _crowd(said: argparse.Namespace) -> None:
    chance = random.Random(0)
    asked = bodies(said.images, [chance.randint(1, 1000) for _ in range(said.images)])
    bad = set(range(5, said.images, 20))
    for index in bad:
        asked[index] = {**asked[index], "images": [BAD[index % len(BAD)]]}
    leaving = {index for index in range(said.images) if index % 10 == 7}  # noqa: PLR2004
    with running(said.checkpoint, max_waiting=10**9, timeout=3600) as (url, _):
        address = f"{url}/v1/impute"
        together = asyncio.run(_at_once(address, contents(asked), leaving))
        kept = [index for index in together if index not in bad]
        alone = asyncio.run(_one_by_one(address, contents([asked[index] for index in kept])))
    same = sum(
        answer.status == HTTPStatus.OK and together[index].body == answer.body
        for index, answer in zip(kept, alone, strict=True)
    )
    say(f"{said.images} at once: {len(leaving)} left, of the bad", end=" ")
    say(Counter(together[index].status for index in bad if index in together))
    say(f"{same} of the other {len(kept)} have the bytes that they have alone")


async def _at_once(url: str, ready: list[bytes], leaving: set[int]) -> dict[int, Answer]:
    chance = random.Random(1)
    found: dict[int, Answer] = {}

    async def one(client: aiohttp.ClientSession, index: int) -> None:
        patience = chance.uniform(0.1, 30.0) if index in leaving else None
        try:
            async with asyncio.timeout(patience):
                found[index] = await ask(client, url, ready[index])
        except TimeoutError:
            if patience is None:
                raise

    async with session() as client:
        await asyncio.gather(*(one(client, index) for index in range(len(ready))))
    return found


async def _one_by_one(url: str, ready: list[bytes]) -> list[Answer]:
    async with session() as client:
        return [await ask(client, url, content) for content in ready]


def _neighbour(said: argparse.Namespace) -> None:
    with running(said.checkpoint) as (url, _):
        address = f"{url}/v1/impute"
        for particles in (64, 1000):
            asked = bodies(PICTURES, particles)
            Load.closed(address, asked, connections=1, seconds=2.0)
            idle, beside = [], []
            for _ in range(3):
                idle.append(Load.closed(address, asked, connections=1, seconds=8.0))
                beside.append(asyncio.run(_beside(address, asked)))
            for level in (0.5, 0.99):
                before, after = (
                    float(np.median([load.quantile(level) for load in loads]))
                    for loads in (idle, beside)
                )
                say(
                    f"K = {particles}, quantile {level}: alone {before:.1f} ms, beside "
                    f"K = {HUGE} {after:.1f} ms, {after / before:.2f} times"
                )


async def _beside(url: str, asked: list[dict[str, Any]]) -> Load:
    """Small requests, one after another, as long as a huge one is worked on."""
    (huge,) = contents(bodies(1, HUGE))
    answers: list[Answer] = []
    async with session() as client:
        working = asyncio.create_task(ask(client, url, huge))
        await asyncio.sleep(0.5)
        started = time.perf_counter()
        for content in contents(asked) * 1000:
            answer = await ask(client, url, content)
            if working.done():
                break
            answers.append(answer)
        await working
        return Load(answers, started, time.perf_counter() - started)


def _overload(said: argparse.Namespace) -> None:
    asked = bodies(PICTURES, 1000)
    with running(said.checkpoint, max_waiting=400_000) as (url, process), _giving_way():
        address = f"{url}/v1/impute"

        def peak() -> float:
            return Load.closed(address, asked, connections=64, seconds=said.seconds / 4).rate

        before = peak()
        load, probes, sizes = asyncio.run(
            _watched(url, process, contents(asked), 10 * before, said.seconds)
        )
        mean = (before + peak()) / 2
    within = load.within(said.seconds)
    statuses = Counter(answer.status for answer in load.answers)
    told = sum(
        "Retry-After" in answer.headers
        for answer in load.answers
        if answer.status == HTTPStatus.TOO_MANY_REQUESTS
    )
    say(f"peak {before:.1f} results/s before, {mean:.1f} the mean of before and after")
    say(f"offered {10 * before:.0f}/s, statuses in the end {dict(statuses)}")
    say(f"with Retry-After: {told} of {statuses[HTTPStatus.TOO_MANY_REQUESTS]}")
    say(f"in {said.seconds:.0f} s {len(within.answers)} answers")
    say(f"goodput {within.rate:.1f} results/s, {within.rate / mean:.2f} of the mean peak")
    say(
        f"memory {min(sizes) / 2**20:.0f} to {max(sizes) / 2**20:.0f} MB; "
        f"/health/ready median {1000 * float(np.median(probes)):.1f} ms, "
        f"99 % {1000 * float(np.quantile(probes, 0.99)):.1f} ms, "
        f"at most {1000 * max(probes):.1f} ms of {len(probes)}"
    )


@contextmanager
def _giving_way() -> Generator[None]:
    """Never interrupts the service's HTTP, for whose lock the model's thread waits meanwhile."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        yield
    finally:
        _as_usual()


def _as_usual() -> None:
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


async def _watched(
    url: str, process: int, ready: list[bytes], rate: float, seconds: float
) -> tuple[Load, list[float], list[int]]:
    """What came of requests by chance; meanwhile, how long readiness took, and the memory."""
    with ProcessPoolExecutor(1, get_context("fork"), _as_usual) as pool:
        probing = asyncio.get_running_loop().run_in_executor(pool, _probed, url, process, seconds)
        async with session() as client:
            load = await arriving(client, f"{url}/v1/impute", ready, rate=rate, seconds=seconds)
        return load, *await probing


def _probed(url: str, process: int, seconds: float) -> tuple[list[float], list[int]]:
    probes: list[float] = []
    sizes: list[int] = []
    started = time.perf_counter()
    with httpx.Client() as client:
        while (begun := time.perf_counter()) < started + seconds:
            client.get(f"{url}/health/ready").raise_for_status()
            probes.append(time.perf_counter() - begun)
            if begun > started + seconds / 4:  # the queue is full by then
                sizes.append(_memory(process, "VmRSS"))
            time.sleep(0.1)
    return probes, sizes


def _memory(process: int, what: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith(what))
    return 1024 * int(size)


def _peak(said: argparse.Namespace) -> None:
    before = 0
    for particles in (1000, HUGE):
        with running(said.checkpoint) as (url, process):
            Load.closed(f"{url}/v1/impute", bodies(1, particles), connections=1, seconds=1.0)
            most = _memory(process, "VmHWM") / 2**20
        more = f", {most - before:+.1f} MB" if before else ""
        say(f"K = {particles}: at most {most:.0f} MB{more}")
        before = most


def _lone(said: argparse.Namespace) -> None:
    with running(said.checkpoint) as (url, _):
        load = Load.closed(
            f"{url}/v1/impute", bodies(PICTURES, 1000), connections=1, seconds=said.seconds / 4
        )
        parts = [_parts(answer) for answer in load.good]
        medians = {name: float(np.median([each[name] for each in parts])) for name in parts[0]}
        say(f"K = 1000: {load.quantile(0.5):.1f} ms, of which", end=" ")
        say(", ".join(f"{name} {each:.1f}" for name, each in medians.items()))
        for pause in (0.0, medians["compute"] / 1000):
            seconds = asyncio.run(_empty(f"{url}/health/live", pause))
            say(f"nothing, {1000 * pause:.0f} ms after the last: {1000 * seconds:.1f} ms")


def _parts(answer: Answer) -> dict[str, float]:
    """The milliseconds of Server-Timing, and those outside of the handler."""
    told = (part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
    parts = {name: float(milliseconds) for name, milliseconds in told}
    return {**parts, "the way": 1000 * answer.seconds - sum(parts.values())}


async def _empty(url: str, pause: float) -> float:
    """The median seconds of an answer with nothing in it."""
    taken: list[float] = []
    async with session() as client:
        for _ in range(EMPTY):
            await asyncio.sleep(pause)
            begun = time.perf_counter()
            async with client.get(url) as answer:
                await answer.read()
            taken.append(time.perf_counter() - begun)
    return float(np.median(taken))


EMPTY = 100

PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "crowd": _crowd,
    "neighbour": _neighbour,
    "overload": _overload,
    "memory": _peak,
    "lone": _lone,
}

if __name__ == "__main__":
    main()
