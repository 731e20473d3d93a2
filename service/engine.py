"""The engine: one thread that owns the device.

Work is one image at a time in stages that are not long. Every round takes one stage of each image
that is being worked on, so that no request waits for another's thousand blocks; an image never
shares a computation with another, so that its answer has the same bits whoever its neighbours are.
Work in the background is done where there is nothing else to do, a stage at a time.
Admission is bounded by particles that wait, and refuses beyond; what was cancelled or comes too
late is dropped at its next stage; an image that fails, fails alone; what the device has no memory
for is begun again with fewer beside it.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import torch

from service.errors import Expired, Failed, NotReady, Overloaded, Problem, TooLarge
from service.work import BLOCK, PREPARATION, Job, Stages

__all__ = ["Answers", "Engine"]

log = logging.getLogger(__name__)


@dataclass
class _Task:
    """A job on its way."""

    job: Job
    until: float
    """When its answer is too late; of time.monotonic()."""
    background: bool
    future: Future[Any] = field(default_factory=Future)
    stages: Stages[Any] | None = None
    seconds: float = 0.0
    """That the device has spent on it since it was last begun."""
    before: float = 0.0
    """That it had spent on it until then."""
    turn: float = field(default_factory=time.monotonic)
    """When it last had one, or came."""
    again: bool = False
    """Whether it was begun again because the device had no memory."""

    def restart(self, job: Job | None = None) -> None:
        """Forgets what was done, for the same job or for another in its place."""
        self.job, self.stages = job or self.job, None
        self.before, self.seconds = self.before + self.seconds, 0.0


@dataclass(frozen=True)
class Answers:
    """The results of a request's jobs, in their order."""

    results: list[Any]
    worked: float
    """Seconds that the device has spent on them."""
    waited: float
    """Seconds in which they were admitted and the device did something else."""


class Engine:
    """Admits jobs, works on them in turn, and answers each exactly once."""

    def __init__(
        self,
        *,
        threads: int = 1,
        max_request: int = 2_000_000,
        max_waiting: int = 4_000_000,
    ) -> None:
        self._threads = threads
        self._max_request, self._max_waiting = max_request, max_waiting
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = {False: 0, True: 0}
        """The cost of what waits, of requests and in the background."""
        self._done, self._spent = 50_000.0, 1.0
        self._at_once = AT_ONCE
        self._open = False
        self._deadline = math.inf
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to admit jobs."""
        self._thread.start()
        self._open = True

    def stop(self, *, seconds: float) -> None:
        """Admits no more, gives what was admitted so long to finish, and refuses the rest."""
        with self._lock:  # after the end nothing may come into the inbox
            self._open = False
            self._deadline = time.monotonic() + seconds
            self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds + 1.0)

    @property
    def ready(self) -> bool:
        """Whether jobs are admitted and the thread has lately come round."""
        idle = self.waiting == 0
        return self._open and self._thread.is_alive() and (idle or self._since_beat() < STUCK)

    @property
    def waiting(self) -> int:
        """The cost of what was admitted and is not finished."""
        return sum(self._waiting.values())

    async def submit(
        self, jobs: Sequence[Job], *, seconds: float = math.inf, background: bool = False
    ) -> Answers:
        """The results of one request's jobs; leaving early drops the work.

        Raises:
            TooLarge: The jobs are more than any request may bring.
            Overloaded: Too much is waiting.
            NotReady: The engine is starting or stopping.
            Expired: So many seconds have passed and not all is done.
        """
        admitted = time.monotonic()
        tasks = self._admit(jobs, until=admitted + seconds, background=background)
        try:
            results = await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))
        finally:
            for task in tasks:
                task.future.cancel()
        worked = sum(task.before + task.seconds for task in tasks)
        return Answers(results, worked, max(0.0, time.monotonic() - admitted - worked))

    def _admit(self, jobs: Sequence[Job], *, until: float, background: bool) -> list[_Task]:
        cost = sum(job.cost for job in jobs)
        if cost > self._max_request:
            raise TooLarge.of(
                "particles",
                f"at most {self._max_request} in a request, over all its images, each with "
                f"whole blocks of {BLOCK}, {PREPARATION} more of them, and its draws",
                str(cost),
            )
        tasks = [_Task(job, until, background) for job in jobs]
        with self._lock:
            if not self._open:
                raise NotReady("The service is starting or shutting down.")
            waiting = self._waiting[background]
            if waiting and waiting + cost > self._max_waiting:
                seconds = max(1, math.ceil(waiting * self._spent / self._done))
                raise Overloaded(waiting=waiting + cost, limit=self._max_waiting, seconds=seconds)
            if not self.waiting:
                self._beat = time.monotonic()  # the thread has had nothing to come round for
            self._waiting[background] += cost
            for task in tasks:
                self._inbox.put(task)
        return tasks

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        active: list[_Task] = []
        stopping = False
        with torch.inference_mode():
            while not (stopping and not active):
                stopping |= self._receive(active, block=not active and not stopping)
                turn = self._turn(active)
                ended = {id(task) for task in turn if not self._advance(task, active)}
                # What is in the background goes to the end of the line after its turn.
                active.sort(key=lambda task: task.turn if task.background else 0.0)
                active = [task for task in active if id(task) not in ended]

    def _turn(self, active: list[_Task]) -> list[_Task]:
        """Whose stages the next round has: all requests, or else one task of the background.

        What has waited there for very long counts as a request. Of many, those that came last
        wait until others are done: what is begun takes memory.
        """
        patient = time.monotonic() - PATIENCE
        urgent = [task for task in active if not task.background or task.turn < patient]
        return urgent[: self._at_once] or active[:1]

    def _receive(self, active: list[_Task], *, block: bool) -> bool:
        """Moves what has queued to the active tasks; says whether the end is among it."""
        stopping = False
        while True:
            try:
                task = self._inbox.get(block=block)
            except queue.Empty:
                return stopping
            block = False
            if task is None:
                stopping = True
            else:
                active.append(task)

    def _advance(self, task: _Task, active: list[_Task]) -> bool:
        """Does a task's next stage; says whether there are more."""
        started = self._beat = task.turn = time.monotonic()
        if task.future.cancelled():
            self._leave(task)
            return False
        try:
            if started > self._deadline:
                raise NotReady("The service is shutting down.")  # noqa: TRY301
            if started > task.until:
                raise Expired(begun=task.stages is not None)  # noqa: TRY301
            return self._step(task, started)
        except Problem as problem:
            self._answer(task, problem=problem)
        except torch.OutOfMemoryError:
            if not task.again:
                return self._begin_again(task, active)
            self._answer(task, problem=Failed("The device has no memory for this image."))
        except Exception:
            log.exception("A job failed.")
            self._answer(task, problem=Failed("The model failed on this image."))
        return False

    def _step(self, task: _Task, started: float) -> bool:
        if task.stages is None:
            task.stages = task.job.stages()
        try:
            next(task.stages)
        except StopIteration as done:
            task.seconds += time.monotonic() - started
            self._measure(task)
            job = task.job.instead(done.value)
            if job is None or job.cost > self._max_request:
                self._answer(task, result=done.value)
                return False
            self._replace(task, job)
        else:
            task.seconds += time.monotonic() - started
        return True

    def _begin_again(self, task: _Task, active: list[_Task]) -> bool:
        """Forgets half of what was begun, which has the same answers when it is done later."""
        begun = [each for each in active if each.stages is not None and each is not task]
        self._at_once = max(1, (len(begun) + 1) // 2)
        log.warning("The device has no memory: %d images are worked on at once.", self._at_once)
        task.again = True
        for each in [task, *begun[self._at_once :]]:
            each.restart()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _replace(self, task: _Task, job: Job) -> None:
        """Begins another job for the same answer; it was admitted, and is not refused now."""
        with self._lock:
            self._waiting[task.background] += job.cost - task.job.cost
            task.restart(job)

    def _answer(self, task: _Task, *, result: Any = None, problem: Problem | None = None) -> None:
        self._leave(task)
        try:
            if problem is None:
                task.future.set_result(result)
            else:
                task.future.set_exception(problem)
        except InvalidStateError:
            return  # cancelled in the meantime: there is nobody to answer

    def _leave(self, task: _Task) -> None:
        task.stages = None  # with the arrays that it holds
        with self._lock:
            self._waiting[task.background] -= task.job.cost

    def _measure(self, task: _Task) -> None:
        """Counts a finished task in the rate, the latest the most."""
        self._at_once = min(self._at_once + 1, AT_ONCE)
        with self._lock:
            self._done = 0.9 * self._done + task.job.cost
            self._spent = 0.9 * self._spent + task.seconds

    def _since_beat(self) -> float:
        return time.monotonic() - self._beat


AT_ONCE = 256
"""Images that are begun and not ended; each holds a few arrays of its size."""
PATIENCE = 60.0
"""Seconds after which work in the background is done before more requests."""
STUCK = 30.0
"""Seconds after which an engine that has not come round is not ready: no stage takes so long."""
