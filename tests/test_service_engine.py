"""The engine: every admitted job ends once, none waits for another's thousand blocks."""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.noise import Noise
from model.stages import finish
from service.engine import Engine
from service.errors import BadInput, Expired, Failed, NotReady, Overloaded, TooLarge
from service.models import Model, Models
from service.work import (
    BLOCK,
    PREPARATION,
    Estimate,
    Imputation,
    Impute,
    Job,
    Quality,
    Sample,
    Score,
)
from tests.wire import SHAPE, random_mask, write_checkpoint

T = TypeVar("T")
BLANK = np.zeros(SHAPE, np.float32)
ESTIMATE = Estimate(
    value=-1.0,
    standard_error=0.1,
    effective_sample_size=30.0,
    pareto_k=0.5,
    reliable=True,
    particles=64,
    estimator="importance",
    kind="lower bound",
    acceptance=None,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model."""
    path = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(path)
    return Models(path, device="cpu").get("tiny")


@pytest.fixture
def engine() -> Generator[Engine]:
    """A running engine."""
    running = Engine()
    running.start()
    yield running
    running.stop(seconds=10)


@dataclass
class Fake:
    """A job of so many blocks, which does as it is told and tells what it did."""

    blocks: int = 1
    cost: int = 1
    failure: Exception | None = None
    gate: threading.Event | None = None
    """Is waited for in the first block."""
    began: threading.Event = field(default_factory=threading.Event)
    at_end: Callable[[], None] = lambda: None
    done: int = 0
    better: "Fake | None" = None
    """What is done in place of an answer."""

    alike: Any = None
    """Those with the same are worked on together."""

    @staticmethod
    def together(jobs: Sequence["Fake"]) -> Generator[None, None, list["Fake"]]:
        """The work of all, one after another in each stage."""
        return (yield from _in_step([job.stages() for job in jobs]))

    def stages(self) -> Generator[None, None, "Fake"]:
        """The work."""
        self.began.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        for _ in range(self.blocks):
            self.done += 1
            yield
        if self.failure is not None:
            raise self.failure
        self.at_end()
        return self

    def instead(self, _result: "Fake") -> "Fake | None":
        """The better job, where there is one."""
        return self.better


def _in_step(works: Sequence[Generator[None, None, Fake]]) -> Generator[None, None, list[Fake]]:
    results: dict[int, Fake] = {}
    while len(results) < len(works):
        for index, work in enumerate(works):
            if index not in results:
                try:
                    next(work)
                except StopIteration as done:
                    results[index] = done.value
        if len(results) < len(works):
            yield
    return [results[index] for index in range(len(works))]


async def _submit(engine: Engine, *jobs: Any, **options: Any) -> list[Any]:
    return (await engine.submit(jobs, **options)).results


async def _began(job: Fake) -> None:
    assert await asyncio.to_thread(job.began.wait, 30)


async def _until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110  (threads know no asyncio.Event)
        await asyncio.sleep(0)


def _run(scenario: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(scenario(), 60))


# Every job ends once


def test_results_come_in_the_order_of_the_jobs(engine: Engine):
    """Whatever ends first, each result is at its job's place."""
    jobs = [Fake(blocks=blocks) for blocks in (9, 1, 5, 0)]

    assert _run(lambda: _submit(engine, *jobs)) == jobs
    assert [job.done for job in jobs] == [9, 1, 5, 0]
    assert engine.waiting == 0


@pytest.mark.parametrize("background", [False, True])
def test_a_small_job_ends_before_a_huge_one_that_came_first(engine: Engine, background: bool):  # noqa: FBT001
    """Blocks are done in turn: ten blocks end before a thousand, and one before ten.

    That holds among requests and among what is in the background.
    """
    ended: list[int] = []

    async def scenario() -> None:
        gate = threading.Event()
        jobs = [
            Fake(blocks=n, gate=gate, at_end=lambda n=n: ended.append(n)) for n in (1000, 10, 1)
        ]
        tasks = [asyncio.create_task(_submit(engine, job, background=background)) for job in jobs]
        await _began(jobs[0])
        await _until(lambda: engine.waiting == 3)
        gate.set()
        await asyncio.gather(*tasks)

    _run(scenario)
    assert ended == [1, 10, 1000]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RuntimeError("out of memory"), Failed),
        (KeyError("x"), Failed),
        (BadInput.of("image", "a", "b"), BadInput),
    ],
)
def test_a_job_that_fails_fails_alone(
    engine: Engine, failure: Exception, expected: type[Exception]
):
    """Its request has the failure, without the model's own words; others have their results."""

    async def scenario() -> list[Any]:
        good, bad, after = Fake(blocks=50), Fake(blocks=3, failure=failure), Fake()
        requests = [asyncio.create_task(_submit(engine, job)) for job in (good, bad)]
        ended = await asyncio.gather(*requests, return_exceptions=True)
        return [*ended, await _submit(engine, after)]

    good, bad, after = _run(scenario)
    assert good[0].done == 50
    assert isinstance(bad, expected)
    assert "memory" not in str(bad)
    assert after[0].done == 1
    assert (engine.waiting, engine.ready) == (0, True)


def test_work_that_cannot_be_begun_fails_alone(engine: Engine):
    """Where a job has no stages to give, and where it does not know its cost or its like."""

    class Broken(Fake):
        @staticmethod
        def together(jobs: Sequence[Fake]) -> Generator[None, None, list[Fake]]:  # noqa: ARG004
            raise ValueError

    class Unknown(Fake):
        @property
        def alike(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            raise ValueError

        @alike.setter
        def alike(self, _value: Any) -> None: ...

    async def scenario() -> None:
        gate = threading.Event()
        first = Fake(blocks=2, gate=gate)
        requests = [asyncio.create_task(_submit(engine, first))]
        await _began(first)
        jobs = [Broken(), Fake(blocks=3), Unknown(), Fake()]
        requests += [asyncio.create_task(_submit(engine, job)) for job in jobs]
        await _until(lambda: engine.waiting == 4)
        gate.set()
        kinds = [type(each) for each in await asyncio.gather(*requests, return_exceptions=True)]
        assert kinds == [list, Failed, list, ValueError, list]

    _run(scenario)
    assert engine.waiting == 0


def test_the_failure_of_an_image_ends_its_request(engine: Engine):
    """The other images of the same request are not worked on for nobody."""

    async def scenario() -> Fake:
        long = Fake(blocks=10**9)
        with pytest.raises(Failed):
            await _submit(engine, long, Fake(failure=RuntimeError()))
        await _submit(engine, Fake(blocks=2))
        await _until(lambda: engine.waiting == 0)
        return long

    assert _run(scenario).done < 10**9


def test_what_was_cancelled_is_dropped_at_its_next_block(engine: Engine):
    """A request that is left costs no more than the block that was being done."""

    async def scenario() -> list[Fake]:
        gate = threading.Event()
        running, queued = Fake(blocks=100, cost=7, gate=gate), Fake(blocks=100, cost=5)
        request = asyncio.create_task(_submit(engine, running, queued))
        await _began(running)
        assert engine.waiting == 12
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        gate.set()
        await _submit(engine, Fake())
        await _until(lambda: engine.waiting == 0)
        return [running, queued]

    running, queued = _run(scenario)
    assert running.done <= 1
    assert not queued.began.is_set()


Step = tuple[str, Any]
JOB = st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 9))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(JOB, max_size=4)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.integers(0, 3)),
        st.tuples(st.just("stop"), st.sampled_from([0.0, 30.0])),
    ),
    max_size=12,
)


@dataclass
class Story:
    """What happens to an engine, and the requests that were made of it."""

    engine: Engine
    requests: list[tuple[list[Fake], asyncio.Task[list[Any]]]] = field(default_factory=list)
    stops: list[asyncio.Task[None]] = field(default_factory=list)

    async def submit(self, jobs: list[tuple[int, bool, int]]) -> None:
        """A request of jobs of so many blocks, of which some fail."""
        fakes = [Fake(n, cost, failure=ValueError() if bad else None) for n, bad, cost in jobs]
        self.requests.append((fakes, asyncio.create_task(_submit(self.engine, *fakes))))

    async def cancel(self, index: int) -> None:
        """The client of a request leaves."""
        for _, task in self.requests[index : index + 1]:
            task.cancel()

    async def wait(self, times: int) -> None:
        """The event loop turns."""
        for _ in range(times):
            await asyncio.sleep(0)

    async def stop(self, seconds: float) -> None:
        """The service is told to end."""
        stop = asyncio.to_thread(self.engine.stop, seconds=seconds)
        self.stops.append(asyncio.create_task(stop))

    async def tell(self, steps: Sequence[Step]) -> None:
        """All of it, and then the end of every request."""
        for kind, argument in steps:
            await getattr(self, kind)(argument)
        tasks = [task for _, task in self.requests]
        await asyncio.gather(*tasks, *self.stops, return_exceptions=True)


@given(STEPS)
def test_every_admitted_job_ends_in_exactly_one_way(steps: Sequence[Step]):
    """However submitting, leaving, failing and stopping interleave.

    Each request ends in its results, one problem, or as cancelled, and nothing is left behind.
    """
    story = Story(Engine(max_waiting=30))
    story.engine.start()
    _run(lambda: story.tell(steps))
    story.engine.stop(seconds=30)

    assert story.engine.waiting == 0
    for fakes, task in story.requests:
        failure = None if task.cancelled() else task.exception()
        assert failure is None or isinstance(failure, Failed | Overloaded | NotReady)
        assert not isinstance(failure, Failed) or any(fake.failure for fake in fakes)
        if failure is None and not task.cancelled():
            assert task.result() == fakes
            assert all(fake.done == fake.blocks and not fake.failure for fake in fakes)


# Together


def test_what_is_alike_and_waits_is_worked_on_together(engine: Engine):
    """Jobs that came while the engine was busy share their stages; each has its own result."""
    together: list[int] = []

    class Counted(Fake):
        @staticmethod
        def together(jobs: Sequence[Fake]) -> Generator[None, None, list[Fake]]:
            together.append(len(jobs))
            return (yield from Fake.together(jobs))

    async def scenario() -> list[list[Any]]:
        gate = threading.Event()
        first = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        others = [Counted(blocks=n % 3, alike="a") for n in range(20)]
        others += [Counted(alike="b"), Counted(), Counted()]
        tasks = [asyncio.create_task(_submit(engine, job)) for job in others]
        await _until(lambda: engine.waiting == 24)
        gate.set()
        await request
        done = await asyncio.gather(*tasks)
        assert done == [[job] for job in others]
        return done

    _run(scenario)
    assert sorted(together) == [1, 1, 1, 4, 16]
    assert engine.waiting == 0


def test_what_is_alike_waits_for_its_like_and_others_do_not(engine: Engine):
    """Those that come meanwhile are then begun together; a job of another kind passes them."""
    began: list[str] = []

    async def scenario() -> None:
        gate = threading.Event()
        # so many that one stage which the system interrupts does not outweigh them
        first = Fake(alike="a", gate=gate, blocks=20_000, at_end=lambda: began.append("first"))
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        later = [
            Fake(alike="a", blocks=n, at_end=lambda n=n: began.append(f"like {n}")) for n in (2, 1)
        ]
        other = Fake(alike="b", blocks=50, at_end=lambda: began.append("other"))
        tasks = [asyncio.create_task(_submit(engine, job)) for job in (*later, other)]
        await _until(lambda: engine.waiting == 4)
        gate.set()
        await asyncio.gather(request, *tasks)

    _run(scenario)
    assert began == ["other", "first", "like 1", "like 2"]


@dataclass
class Puzzled(Fake):
    """A job that cannot say whether its result is good."""

    def instead(self, _result: Fake) -> None:
        """Fails."""
        raise ValueError


def test_a_result_that_cannot_be_judged_fails_alone(engine: Engine):
    """Those beside it are answered, and nothing is counted twice."""

    async def scenario() -> list[Any]:
        gate = threading.Event()
        first = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        jobs = [Fake(alike="a"), Puzzled(alike="a"), Fake(alike="a")]
        tasks = [asyncio.create_task(_submit(engine, job)) for job in jobs]
        await _until(lambda: engine.waiting == 4)
        gate.set()
        ended = await asyncio.gather(request, *tasks, return_exceptions=True)
        assert [ended[1], ended[3]] == [[jobs[0]], [jobs[2]]]
        return ended

    assert isinstance(_run(scenario)[2], Failed)
    assert (engine.waiting, engine.ready) == (0, True)


def test_of_many_threads_each_image_is_alone():
    """Their products are shared out among threads by size, which changes bits."""
    engine = Engine(threads=2)
    engine.start()
    jobs = [Fake(alike="a", began=threading.Event()) for _ in range(3)]
    gate = threading.Event()

    async def scenario() -> None:
        first = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        failing = Fake(alike="a", failure=ValueError())
        tasks = [asyncio.create_task(_submit(engine, job)) for job in (*jobs, failing)]
        await _until(lambda: engine.waiting == 5)
        gate.set()
        await asyncio.gather(request, *tasks, return_exceptions=True)

    _run(scenario)
    engine.stop(seconds=10)
    assert [job.done for job in jobs] == [1, 1, 1]  # not begun again because another failed


@pytest.mark.parametrize("failure", [ValueError("x"), BadInput.of("image", "a", "b")])
def test_of_what_is_together_one_that_fails_fails_alone(engine: Engine, failure: Exception):
    """The others are done again without it, and those that were left or are late are let go."""

    async def scenario() -> list[Any]:
        gate = threading.Event()
        first = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        good = [Fake(blocks=2, alike="a") for _ in range(5)]
        bad = Fake(blocks=1, alike="a", failure=failure)
        left, late = Fake(blocks=3, alike="a"), Fake(blocks=3, alike="a")
        tasks = [asyncio.create_task(_submit(engine, job)) for job in (*good[:3], bad, *good[3:])]
        leaving = asyncio.create_task(_submit(engine, left))
        expiring = asyncio.create_task(_submit(engine, late, seconds=0.0))
        await _until(lambda: engine.waiting == 9)
        leaving.cancel()
        gate.set()
        await request
        ended = await asyncio.gather(*tasks, leaving, expiring, return_exceptions=True)
        assert [each for each in ended if isinstance(each, list)] == [[job] for job in good]
        return ended

    ended = _run(scenario)
    assert isinstance(ended[3], BadInput if isinstance(failure, BadInput) else Failed)
    assert isinstance(ended[6], asyncio.CancelledError)
    assert isinstance(ended[7], Expired)
    assert engine.waiting == 0


def _images(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    noise = Noise(5)
    grey = noise.uniform(count, *SHAPE, like=torch.zeros(())).numpy()
    hidden = noise.at("mask").uniform(count, *SHAPE[1:], like=torch.zeros(())).numpy() < 0.5
    return list(zip(grey, hidden, strict=True))


@pytest.mark.parametrize("quality", ["fast", "standard"])
@pytest.mark.parametrize("count", [2, 5, 16])
@pytest.mark.parametrize("what", ["impute", "score", "score with truth"])
def test_together_each_image_has_the_bits_that_it_has_alone(
    model: Model, quality: Quality, count: int, what: str
):
    """With one thread and dense networks, whatever is asked for."""
    jobs: list[Any] = []
    for index, (values, missing) in enumerate(_images(count)):
        given: dict[str, Any] = {
            "model": model,
            "values": values,
            "missing": missing,
            "particles": 200,
            "seed": index,
            "quality": quality,
        }
        if what == "impute":
            jobs.append(Impute(**given, draws=2, levels=(0.2,)))
        else:
            jobs.append(Score(**given, truth=values if "truth" in what else None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        together = finish(jobs[0].together(jobs))
        alone = [finish(job.together([job]))[0] for job in jobs]
    torch.set_num_threads(threads)

    assert len({job.alike for job in jobs}) == 1
    assert jobs[0].alike is not None
    for one, other in zip(together, alone, strict=True):
        for name, value in vars(one).items():
            same = getattr(other, name)
            assert np.array_equal(value, same) if isinstance(value, np.ndarray) else value == same


def test_many_images_at_once_are_answered_as_each_alone(model: Model):
    """Of two hundred that wait together each answer is its own image's, to the last bit.

    They differ in particles and quality; clients leave and images fail meanwhile.
    """
    engine = Engine(max_waiting=10**9)
    engine.start()
    particles = np.random.default_rng(0).integers(1, 130, 200)
    particles[::2] = 64  # so that there are many alike
    qualities: list[Quality] = ["fast", "standard"]
    jobs = [
        Impute(
            model=model,
            values=values,
            missing=missing,
            particles=int(particles[index]),
            draws=1,
            seed=index,
            quality=qualities[index % 3 % 2],
        )
        for index, (values, missing) in enumerate(_images(200))
    ]
    poisoned, leaving = set(range(5, 200, 20)), set(range(7, 200, 11))
    asked = [
        replace(job, values=BLANK[:, :3]) if i in poisoned else job for i, job in enumerate(jobs)
    ]

    async def scenario() -> None:
        requests = [asyncio.create_task(_submit(engine, job)) for job in asked]
        left = set[int]()  # without those that have their answer already
        for index in leaving:
            await asyncio.sleep(0)
            if requests[index].cancel():
                left.add(index)
        assert left
        together = await asyncio.gather(*requests, return_exceptions=True)
        for index, (job, one) in enumerate(zip(jobs, together, strict=True)):
            if index in left:
                assert isinstance(one, asyncio.CancelledError)
            elif index in poisoned:
                assert isinstance(one, Failed)
            else:
                assert not isinstance(one, BaseException)
                (answer,), (alone,) = one, await _submit(engine, job)
                assert np.array_equal(answer.draws, alone.draws)
                assert np.array_equal(answer.mean, alone.mean)
                assert answer.log_likelihood == alone.log_likelihood

    _run(scenario)
    engine.stop(seconds=10)
    assert engine.waiting == 0


def test_what_is_not_alike_is_alone(model: Model):
    """Chains are not the same together, and what stops early stops when it is enough for it."""
    values, missing = _images(1)[0]
    job = Impute(model=model, values=values, missing=missing, particles=64, draws=1, seed=0)
    score = Score(model=model, values=values, missing=missing, truth=None, particles=64, seed=0)

    assert replace(job, seed=1, values=1 - values).alike == job.alike
    for different in (
        replace(job, particles=65),
        replace(job, draws=2),
        replace(job, levels=(0.5,)),
        replace(job, quality="fast"),
        replace(score, truth=values),
        replace(score, estimator="prior"),
        score,
    ):
        assert different.alike not in (None, job.alike)
    for other in (
        replace(job, quality="high"),
        replace(job, tolerance=0.1),
        replace(score, quality="high"),
        replace(score, estimator="annealed"),
        replace(score, estimator="jackknife"),
        replace(score, tolerance=0.1),
        Sample(model=model, count=1, seed=0),
    ):
        assert other.alike is None


class Clock:
    """A clock that stands but for what the work takes; at one time the work waits for a gate."""

    def __init__(self, *, stop: float) -> None:
        self.now, self.stop = 0.0, stop
        self.stopped, self.gate = threading.Event(), threading.Event()

    def monotonic(self) -> float:
        """The time."""
        return self.now

    def work(self, seconds: float) -> None:
        """Lets so many pass."""
        if self.now == self.stop:
            self.stopped.set()
            assert self.gate.wait(30)
        self.now += seconds


@dataclass
class Timed(Fake):
    """A job whose stages take so long."""

    seconds: float = 1.0
    clock: Clock = field(default_factory=lambda: Clock(stop=0.0))
    began_at: list[float] = field(default_factory=list)
    """When each of its stages did."""

    def stages(self) -> Generator[None, None, Fake]:
        """The work."""
        for _ in range(self.blocks):
            self.began_at.append(self.clock.now)
            self.clock.work(self.seconds)
            yield
        return self

    def had(self, *, until: float) -> float:
        """Seconds of the device, until one of the clock's."""
        return self.seconds * sum(began < until for began in self.began_at)


@pytest.mark.parametrize("before", [0.0, 100.0])
def test_each_image_has_as_much_of_the_device(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, before: float
):
    """By time and not by stages, whether it is worked on alone or beside its like.

    What one has had before the others came does not count: from then on none has more than
    another by more than a stage.
    """
    clock = Clock(stop=before)
    monkeypatch.setattr("service.engine.time", clock)
    first, short = (Timed(clock=clock, blocks=300) for _ in range(2))
    long = Timed(clock=clock, blocks=20, seconds=10.0)
    pair = [Timed(clock=clock, blocks=100, seconds=2.0, alike="pair") for _ in range(2)]

    async def scenario() -> None:
        requests = [asyncio.create_task(_submit(engine, first))]
        assert await asyncio.to_thread(clock.stopped.wait, 30)
        requests += [asyncio.create_task(_submit(engine, job)) for job in (short, long, *pair)]
        await _until(lambda: engine.waiting == 5)
        clock.gate.set()
        await asyncio.gather(*requests)

    _run(scenario)
    for moment in range(int(before), int(before) + 900, 7):
        had = [job.had(until=moment) for job in (short, long, *pair)]
        had.append(first.had(until=moment) - before)
        assert max(had) - min(had) <= long.seconds + 2 * pair[0].seconds


def test_the_kinds_take_turns(engine: Engine):
    """Someone's hundred that are alike do not stand before what came after them."""
    began: list[str] = []

    class Told(Fake):
        @staticmethod
        def together(jobs: Sequence[Fake]) -> Generator[None, None, list[Fake]]:
            began.append(jobs[0].alike)
            return (yield from Fake.together(jobs))

    async def scenario() -> None:
        gate = threading.Event()
        first = Fake(gate=gate)
        requests = [asyncio.create_task(_submit(engine, first))]
        await _began(first)
        jobs = [Told(alike="many") for _ in range(100)] + [Told(alike="few")]
        requests += [asyncio.create_task(_submit(engine, job)) for job in jobs]
        await _until(lambda: engine.waiting == 102)
        gate.set()
        await asyncio.gather(*requests)

    _run(scenario)
    assert began[:2] == ["many", "few"]
    assert began.count("many") == 7


# Classes, deadlines and memory


def test_the_background_is_worked_on_where_there_is_nothing_else_to_do(engine: Engine):
    """A request that came later ends first, and what was in the background ends after it."""
    ended: list[str] = []

    async def scenario() -> None:
        gate = threading.Event()
        first = Fake(blocks=1000, gate=gate, at_end=lambda: ended.append("background"))
        second = Fake(blocks=500, at_end=lambda: ended.append("request"))
        later = asyncio.create_task(_submit(engine, first, background=True))
        await _began(first)
        sooner = asyncio.create_task(_submit(engine, second))
        await _until(lambda: engine.waiting == 2)
        gate.set()
        await asyncio.gather(later, sooner)

    _run(scenario)
    assert ended == ["request", "background"]
    assert engine.waiting == 0


def test_the_background_is_not_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """What has waited there for long has its turn beside requests that do not end."""
    monkeypatch.setattr("service.engine.PATIENCE", -1.0)

    async def scenario() -> None:
        endless = Fake(blocks=10**12)
        request = asyncio.create_task(_submit(engine, endless))
        await _began(endless)
        await _submit(engine, Fake(blocks=5), background=True)
        request.cancel()

    _run(scenario)


def test_the_background_that_is_overdue_is_one_beside_the_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """However much of it there is: of two that have waited for long the second waits on."""
    monkeypatch.setattr("service.engine.PATIENCE", -1.0)

    async def scenario() -> None:
        endless, first, second = Fake(blocks=10**12), Fake(blocks=10**12), Fake()
        requests = [asyncio.create_task(_submit(engine, endless))]
        await _began(endless)
        work = (_submit(engine, job, background=True) for job in (first, second))
        requests += [asyncio.create_task(each) for each in work]
        await _began(first)
        await _until(lambda: first.done > 100)
        assert not second.began.is_set()
        for request in requests:
            request.cancel()

    _run(scenario)


def test_what_fills_the_background_refuses_no_request():
    """Each has a queue of its own."""
    engine = Engine(max_waiting=10)
    engine.start()

    async def scenario() -> None:
        gate = threading.Event()
        first = Fake(cost=10, gate=gate)
        work = asyncio.create_task(_submit(engine, first, background=True))
        await _began(first)
        with pytest.raises(Overloaded):
            await _submit(engine, Fake(), background=True)
        request = asyncio.create_task(_submit(engine, Fake(cost=10)))
        await _until(lambda: engine.waiting == 20)
        gate.set()
        await asyncio.gather(work, request)

    _run(scenario)
    engine.stop(seconds=10)


def test_an_answer_that_is_too_late_is_none(engine: Engine):
    """It is said whether the work was begun; nothing of it stays, and the next is done."""

    async def scenario() -> list[str]:
        endless = Fake(blocks=10**12)
        told: list[str] = []
        with pytest.raises(Expired) as late:
            await _submit(engine, endless, seconds=0.05)
        told.append(str(late.value))
        gate = threading.Event()
        running = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, running))
        await _began(running)
        queued = Fake()
        waiting = asyncio.create_task(_submit(engine, queued, seconds=0.0))
        await _until(lambda: engine.waiting == 2)
        gate.set()
        with pytest.raises(Expired) as late:
            await waiting
        assert not queued.began.is_set()
        await request
        return [*told, str(late.value)]

    begun, queued = _run(scenario)
    assert "while it was worked on" in begun
    assert "before it was begun" in queued
    assert engine.waiting == 0


@dataclass
class Hungry(Fake):
    """A job for which there is no memory the first few times that it is begun."""

    refusals: int = 1

    def stages(self) -> Generator[None, None, Fake]:
        """The work, or an error of the device."""
        yield
        if self.refusals:
            self.refusals -= 1
            raise torch.OutOfMemoryError
        return (yield from super().stages())


def test_what_there_is_no_memory_for_is_begun_again_with_fewer_beside_it(engine: Engine):
    """All are answered, and those that were put off give what they would have given."""

    async def scenario() -> tuple[list[Any], list[Fake]]:
        gate = threading.Event()
        first = Fake(blocks=3, gate=gate)
        others = [Fake(blocks=40) for _ in range(4)]
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        jobs = [*others, Hungry(blocks=2)]
        tasks = [asyncio.create_task(_submit(engine, job)) for job in jobs]
        await _until(lambda: engine.waiting == 6)
        gate.set()
        return await asyncio.gather(request, *tasks), [first, *jobs]

    done, jobs = _run(scenario)
    assert done == [[job] for job in jobs]
    assert engine.waiting == 0


def test_what_there_is_no_memory_for_twice_fails_alone(engine: Engine):
    """It says so, and the engine goes on."""

    async def scenario() -> list[Any]:
        long = Fake(blocks=50)
        request = asyncio.create_task(_submit(engine, long))
        with pytest.raises(Failed, match="no memory"):
            await _submit(engine, Hungry(refusals=2))
        return await request

    (long,) = _run(scenario)
    assert long.done >= 50
    assert engine.waiting == 0


def test_the_time_of_a_request_is_told(engine: Engine):
    """What the device spent on it, and what it waited, are together no more than it took."""

    async def scenario() -> tuple[float, float, float]:
        started = time.monotonic()
        jobs: list[Any] = [Fake(blocks=100), Fake(blocks=100)]
        answers = await engine.submit(jobs)
        return answers.worked, answers.waited, time.monotonic() - started

    worked, waited, taken = _run(scenario)
    assert worked > 0
    assert waited >= 0
    assert worked + waited <= taken


# Admission


def test_more_than_may_wait_is_refused_until_there_is_room():
    """Past the limit a request is told when to come back, and then it is admitted."""
    engine = Engine(max_waiting=100)
    engine.start()

    async def scenario() -> Overloaded:
        gate = threading.Event()
        first = Fake(cost=80, gate=gate)
        request = asyncio.create_task(_submit(engine, first))
        await _began(first)
        with pytest.raises(Overloaded) as refusal:
            await _submit(engine, Fake(cost=21))
        second = asyncio.create_task(_submit(engine, Fake(cost=20)))
        gate.set()
        await asyncio.gather(request, second)
        await _submit(engine, Fake(cost=21))
        return refusal.value

    refusal = _run(scenario)
    engine.stop(seconds=10)
    assert refusal.status == 429
    assert int(refusal.headers["Retry-After"]) >= 1
    assert "at most 100" in refusal.detail
    assert "to 80" in refusal.detail


def test_the_log_tells_now_and_then_how_many_were_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The first at once; what comes in the seconds after it, when they or all work is over."""
    engine = Engine(max_waiting=1)
    engine.start()

    async def refused() -> None:
        with pytest.raises(Overloaded):
            await _submit(engine, Fake())

    async def scenario() -> None:
        gate = threading.Event()
        first = asyncio.create_task(_submit(engine, Fake(gate=gate)))
        await _until(lambda: engine.waiting == 1)
        for _ in range(3):
            await refused()
        monkeypatch.setattr("service.engine.TELLING", -math.inf)
        await refused()
        monkeypatch.setattr("service.engine.TELLING", math.inf)
        for _ in range(2):
            await refused()
        gate.set()
        await first

    _run(scenario)
    engine.stop(seconds=10)
    told = [record.args for record in caplog.records if "refused" in record.message]
    assert told == [(1,), (3,), (2,)]


def test_what_would_be_refused_is_refused_before_it_is_read():
    """From a refusal on, until a twentieth of the queue is done."""
    engine = Engine(max_waiting=100)
    engine.start()

    async def scenario() -> None:
        gates = [threading.Event(), threading.Event()]
        jobs = [Fake(blocks=0, cost=90, gate=gates[0]), Fake(cost=10, gate=gates[1])]
        requests = [asyncio.create_task(_submit(engine, jobs[0]))]
        await _began(jobs[0])
        requests.append(asyncio.create_task(_submit(engine, jobs[1])))
        await _until(lambda: engine.waiting == 100)
        engine.refuse_early()  # it is full, but nobody has come for whom there was no room
        with pytest.raises(Overloaded):
            await _submit(engine, Fake())
        with pytest.raises(Overloaded) as refusal:
            engine.refuse_early()
        assert "Retry-After" in refusal.value.headers
        gates[0].set()
        await requests[0]
        engine.refuse_early()
        gates[1].set()
        await requests[1]

    _run(scenario)
    engine.stop(seconds=10)


def test_an_idle_engine_admits_what_a_request_may_bring():
    """A request below its own limit is never refused for ever."""
    engine = Engine(max_waiting=10, max_request=50)
    engine.start()

    assert len(_run(lambda: _submit(engine, Fake(cost=50)))) == 1
    with pytest.raises(TooLarge, match="at most 50"):
        _run(lambda: _submit(engine, Fake(cost=25), Fake(cost=26)))
    engine.stop(seconds=10)
    assert engine.waiting == 0


def _cost_and_rows(asked: Impute | Score) -> tuple[int, int]:
    job = cast("Job", asked)
    rows: list[int] = []
    hook = asked.model.network.decoder.register_forward_hook(
        lambda _module, inputs, _output: rows.append(math.prod(inputs[0].shape[:-1]))
    )
    with torch.inference_mode():
        for _ in job.together([job]):
            pass
    hook.remove()
    return job.cost, sum(rows)


@pytest.mark.parametrize("truth", [None, BLANK])
@pytest.mark.parametrize("particles", [1, 64, 65, 1000])
def test_a_job_costs_the_rows_that_the_decoder_sees(
    model: Model, particles: int, truth: np.ndarray | None
):
    """Admission counts the work itself, so that many small requests are not free.

    Beside the rows it counts the derivatives that a proposal takes of a model of 40 latents.
    """
    missing = random_mask()
    impute = Impute(
        model=model, values=BLANK, missing=missing, particles=particles, draws=3, seed=0
    )
    score = Score(
        model=model, values=BLANK, missing=missing, truth=truth, particles=particles, seed=0
    )
    block = BLOCK * math.ceil(particles / BLOCK)
    looks = 2 if truth is not None else 1

    for job, blocks, proposals in ((impute, block + 3, 1), (score, looks * block, looks)):
        cost, rows = _cost_and_rows(job)
        assert cost == blocks + proposals * PREPARATION["standard"] * BLOCK
        assert blocks < rows <= cost


@pytest.mark.parametrize("quality", ["fast", "high"])
def test_a_job_of_another_quality_costs_no_more_than_it_says(model: Model, quality: Quality):
    """A gradient is three rows, and the chains' are most of the cost of high quality."""
    job = Impute(
        model=model,
        values=BLANK,
        missing=random_mask(),
        particles=64,
        draws=3,
        levels=(0.5,),
        seed=0,
        quality=quality,
    )
    cost, rows = _cost_and_rows(job)

    assert cost / 4 < rows <= cost


def test_a_sample_costs_its_images(engine: Engine, model: Model):
    """Images are drawn one at a time, each with a seed of its own."""
    job = Sample(model=model, count=5, seed=1)
    (drawn,) = _run(lambda: _submit(engine, job))

    assert job.cost == 5
    assert drawn.shape == (5, *SHAPE)


# Doubt


def test_in_place_of_a_doubtful_answer_the_better_work_is_done(engine: Engine):
    """Its result is the answer, and what waits is what is left of it."""
    waiting: list[int] = []
    better = Fake(blocks=2, cost=50, at_end=lambda: waiting.append(engine.waiting))
    quick = Fake(cost=3, better=better)

    assert _run(lambda: _submit(engine, quick)) == [better]
    assert (quick.done, better.done) == (1, 2)
    assert waiting == [50]
    assert engine.waiting == 0


def test_better_work_that_fails_is_a_failure(engine: Engine):
    """Nothing is answered that was in doubt, and the next job is done."""
    worse = Fake(better=Fake(failure=ValueError()))
    with pytest.raises(Failed):
        _run(lambda: _submit(engine, worse))
    good = Fake()

    assert _run(lambda: _submit(engine, good)) == [good]
    assert engine.waiting == 0


def test_better_work_that_no_request_may_bring_is_not_begun():
    """The answer is then the one that is in doubt, and it says what it is."""
    engine = Engine(max_request=49)
    engine.start()
    quick = Fake(cost=3, better=Fake(cost=50))

    assert _run(lambda: _submit(engine, quick)) == [quick]
    engine.stop(seconds=10)


@pytest.mark.parametrize("doubtful", [True, False])
def test_high_quality_comes_in_place_of_doubt(model: Model, doubtful: bool):  # noqa: FBT001
    """A job that escalates is done again in high quality where its result is in doubt, once."""
    job = Impute(model=model, values=BLANK, missing=random_mask(), particles=64, draws=1, seed=4)
    result = Imputation(BLANK, BLANK, BLANK, BLANK, ESTIMATE, doubtful, "standard")

    assert job.instead(result) is None
    harder = replace(job, escalates=True).instead(result)
    assert harder == (replace(job, quality="high") if doubtful else None)


# Start and stop


def test_nothing_is_admitted_before_the_start_or_after_the_stop():
    """Both are told as not ready, with a time to come back."""
    engine = Engine()
    assert not engine.ready
    with pytest.raises(NotReady) as refusal:
        _run(lambda: _submit(engine, Fake()))
    assert refusal.value.headers == {"Retry-After": "1"}
    engine.start()
    assert engine.ready
    engine.stop(seconds=10)
    engine.stop(seconds=10)

    assert not engine.ready
    with pytest.raises(NotReady):
        _run(lambda: _submit(engine, Fake()))


def test_an_engine_that_never_started_can_be_stopped():
    """Which is what happens when the start fails."""
    Engine().stop(seconds=1)


def test_stopping_finishes_what_was_admitted():
    """Running and queued jobs get their results; later ones are refused."""
    engine = Engine()
    engine.start()

    async def scenario() -> list[Any]:
        gate = threading.Event()
        running, queued = Fake(blocks=20, gate=gate), Fake(blocks=30)
        requests = [asyncio.create_task(_submit(engine, job)) for job in (running, queued)]
        await _began(running)
        stop = asyncio.create_task(asyncio.to_thread(engine.stop, seconds=30))
        await _until(lambda: not engine.ready)
        with pytest.raises(NotReady):
            await _submit(engine, Fake())
        gate.set()
        await stop
        return await asyncio.gather(*requests)

    (running,), (queued,) = _run(scenario)
    assert (running.done, queued.done) == (20, 30)


def test_stopping_does_not_wait_for_ever():
    """What is not finished in time is refused, not left without an answer."""
    engine = Engine()
    engine.start()

    async def scenario() -> None:
        endless = Fake(blocks=10**12)
        request = asyncio.create_task(_submit(engine, endless))
        await _began(endless)
        await asyncio.to_thread(engine.stop, seconds=0.0)
        with pytest.raises(NotReady):
            await request

    _run(scenario)
    assert engine.waiting == 0


def test_no_job_is_lost_between_admission_and_the_stop():
    """Submitting from many loops while the engine stops: each is answered or refused."""
    for _ in range(20):
        engine = Engine()
        engine.start()
        start = threading.Barrier(5)

        def work(engine: Engine = engine, start: threading.Barrier = start) -> int:
            start.wait(30)
            for answered in itertools.count():
                try:
                    _run(lambda: _submit(engine, Fake()))
                except NotReady:
                    return answered
            raise AssertionError

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            start.wait(30)
            engine.stop(seconds=30)
            assert all(worker.result(30) >= 0 for worker in workers)
        assert engine.waiting == 0


def test_the_end_does_not_overtake_an_admission():
    """Where the stop comes in the middle of an admission, what is admitted is still done."""
    engine = Engine()
    inbox = engine._inbox  # pyright: ignore[reportPrivateUsage]
    stop = threading.Thread(target=engine.stop, kwargs={"seconds": 30})

    class Interrupted:
        """Stops the engine when the first job comes, and gives it the time to do so."""

        get = inbox.get

        def put(self, task: Any) -> None:
            if task is not None:
                stop.start()
                stop.join(0.2)
            inbox.put(task)

    setattr(engine, "_inbox", Interrupted())  # noqa: B010
    engine.start()
    (job,) = _run(lambda: _submit(engine, Fake(blocks=3)))
    stop.join(30)

    assert job.done == 3


def test_a_failure_of_the_engine_itself_answers_all_and_is_survived(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """What is worked on, what waits and what comes meanwhile: none is left without an answer."""
    turn = Engine._turn  # pyright: ignore[reportPrivateUsage]

    async def scenario() -> None:
        gate = threading.Event()
        running = Fake(blocks=2, gate=gate)
        requests = [asyncio.create_task(_submit(engine, running))]
        await _began(running)
        requests += [asyncio.create_task(_submit(engine, Fake(), background=b)) for b in (0, 1)]
        await _until(lambda: engine.waiting == 3)
        monkeypatch.setattr(Engine, "_turn", lambda _: 1 / 0)
        gate.set()
        for answer in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(answer, Failed)
        assert engine.waiting == 0
        monkeypatch.setattr(Engine, "_turn", turn)
        await _submit(engine, Fake())

    _run(scenario)
    assert engine.ready


def test_a_device_that_fails_for_good_ends_the_engine(monkeypatch: pytest.MonkeyPatch):
    """None of what was admitted is at fault, nothing more is, and it is told once."""
    monkeypatch.setattr("service.engine._device_lost", lambda: True)
    told = threading.Semaphore(0)
    engine = Engine(on_lost=told.release)
    engine.start()

    async def scenario() -> None:
        gate = threading.Event()
        failure = RuntimeError("CUDA error: an illegal access")
        running = Fake(blocks=0, failure=failure, gate=gate)
        requests = [asyncio.create_task(_submit(engine, running))]
        await _began(running)
        requests += [asyncio.create_task(_submit(engine, Fake(), background=b)) for b in (0, 1)]
        await _until(lambda: engine.waiting == 3)
        assert not engine.lost
        gate.set()
        for answer in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(answer, NotReady)
            assert "device" in answer.detail
        with pytest.raises(NotReady, match="device"):
            await _submit(engine, Fake())

    _run(scenario)
    assert engine.lost
    assert not engine.ready
    engine.stop(seconds=10)
    assert told.acquire(timeout=30)
    assert not told.acquire(blocking=False)


def test_what_a_stuck_engine_had_is_answered_at_the_end():
    """A stage that does not end keeps no request for ever."""
    engine = Engine()
    engine.start()
    gate = threading.Event()

    async def scenario() -> None:
        stuck = Fake(gate=gate)
        requests = [asyncio.create_task(_submit(engine, job)) for job in (stuck, Fake())]
        await _began(stuck)
        await asyncio.to_thread(engine.stop, seconds=0.0)
        for answer in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(answer, NotReady)

    _run(scenario)
    gate.set()
    assert engine.waiting == 0


def test_a_stuck_engine_is_not_ready(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Where a block takes for ever the engine says so, and an idle one is never stuck."""
    monkeypatch.setattr("service.engine.STUCK", -1.0)
    assert engine.ready

    async def scenario() -> None:
        gate = threading.Event()
        job = Fake(gate=gate)
        request = asyncio.create_task(_submit(engine, job))
        await _began(job)
        assert not engine.ready
        gate.set()
        await request

    _run(scenario)
    assert engine.ready


def test_an_engine_that_was_idle_for_long_is_not_stuck(engine: Engine):
    """The time without work does not count: not even before the thread has seen the new job."""
    gate = threading.Event()

    async def scenario() -> None:
        engine._beat = -math.inf  # pyright: ignore[reportPrivateUsage]
        request = asyncio.create_task(_submit(engine, Fake(gate=gate)))
        await _until(lambda: engine.waiting > 0)
        assert engine.ready
        gate.set()
        await request

    _run(scenario)
