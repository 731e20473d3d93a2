"""The engine: one thread that owns the device.

Work is done in stages that are not long. The next stage is of whose images have had the device for
the least time, so that no request waits for another's thousand blocks. Images of requests that
are alike and wait at the same time are worked on together, where each has the same bits as alone.
Work in the background is done where there is nothing else to do, a stage at a time.
Admission is bounded by particles that wait, and refuses beyond; what was cancelled or comes too
late is dropped at its next stage; an image that fails, fails alone; what the device has no memory
for is begun again with fewer beside it. A device that fails for good ends all, for another process
to begin.
"""

import asyncio
import ctypes
import logging
import math
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence, Set
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from service.errors import Expired, Failed, NotReady, Overloaded, Problem, TooLarge
from service.work import BLOCK, PREPARATION, Job, Stages

__all__ = ["LOST", "Answers", "Engine"]

log = logging.getLogger(__name__)


@dataclass(eq=False)  # one is not another, whatever they hold
class _Task:
    """A job on its way."""

    job: Job
    until: float
    """When its answer is too late; of time.monotonic()."""
    background: bool
    future: Future[Any] = field(default_factory=Future)
    seconds: float = 0.0
    """That the device has spent on this job."""
    before: float = 0.0
    """That it had spent on what was done in vain or in doubt."""
    came: float = field(default_factory=time.monotonic)
    kind: Hashable = field(init=False)
    """What it may be worked on together with; None where nothing may."""
    again: bool = False
    """Whether it is begun again because the device had no memory."""

    def __post_init__(self) -> None:
        self.restart(self.job)

    def restart(self, job: Job | None = None) -> None:
        """Forgets what was done, for the same job or for another in its place."""
        if job is not None:
            alike = job.alike
            self.job, self.kind = job, None if alike is None else (alike, self.background)
        self.before, self.seconds = self.before + self.seconds, 0.0


class _Queue:
    """What waits: the kinds take turns, and within a kind who came first is first."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, deque[_Task]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def put(self, task: _Task) -> None:
        """Behind all others."""
        self._of(task).append(task)

    def put_back(self, task: _Task) -> None:
        """Before all others."""
        self._of(task).appendleft(task)
        self._kinds.move_to_end(_key(task), last=False)

    def take(self, count: int, *, besides: Set[Hashable]) -> list[_Task]:
        """Up to so many that are alike; none of these kinds."""
        for key, tasks in self._kinds.items():
            if key not in besides:
                taken = [tasks.popleft() for _ in range(min(count, len(tasks)))]
                self._kinds.move_to_end(key)
                if not tasks:
                    del self._kinds[key]
                return taken
        return []

    def drop(self, ended: Callable[[_Task], bool]) -> None:
        """Leaves out those of which this is true."""
        for key, tasks in list(self._kinds.items()):
            self._kinds[key] = deque(task for task in tasks if not ended(task))
            if not self._kinds[key]:
                del self._kinds[key]

    @property
    def next(self) -> _Task | None:
        """Whose turn it is."""
        return next((tasks[0] for tasks in self._kinds.values()), None)

    def _of(self, task: _Task) -> deque[_Task]:
        return self._kinds.setdefault(_key(task), deque())


def _key(task: _Task) -> Hashable:
    return task if task.kind is None else task.kind


@dataclass(eq=False)
class _Group:
    """Tasks that are worked on together: one, or several that are alike."""

    tasks: list[_Task]
    """Those that somebody still waits for."""
    stages: Stages[list[Any]]
    places: dict[int, int]
    """Where in the results each task's is."""
    kind: Hashable
    """What may be worked on together with it; None where nothing may."""
    had: float = 0.0
    """Seconds of the device that each of its images has had, in the engine's virtual time."""

    @property
    def background(self) -> bool:
        """Whether nobody asks for it now."""
        return self.tasks[0].background

    @property
    def overdue(self) -> bool:
        """Whether it has been in the background for long."""
        return _overdue(self.tasks[0])


def _stages(tasks: list[_Task]) -> Stages[list[Any]]:
    """Their work, which fails in its first stage where it cannot even be begun."""
    return (yield from tasks[0].job.together([task.job for task in tasks]))


def _overdue(task: _Task) -> bool:
    return task.came < time.monotonic() - PATIENCE


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
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._threads, self._on_lost = threads, on_lost
        self._max_request, self._max_waiting = max_request, max_waiting
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._admitted: set[_Task] = set()
        """All that have no answer yet."""
        self._waiting = {False: 0, True: 0}
        """Their cost, of requests and in the background."""
        self._done, self._spent = 50_000.0, 1.0
        self._full = False
        """Whether a request has been refused, and the queue is not shorter since."""
        self._refused, self._told = 0, -math.inf
        """Requests that the log has not told of yet, and when it last did."""
        self._open = self._lost = False
        self._deadline = math.inf
        self._beat = time.monotonic()
        # what only the thread touches
        self._requests, self._background = _Queue(), _Queue()
        self._groups: list[_Group] = []
        self._at_once = AT_ONCE
        self._virtual_time = 0.0
        """What the group with the latest stage had before it. Who came later, or had no turn for
        a while, counts as having had as much: start-time fair queueing (Goyal et al., 1996)."""
        self._swept = 0.0
        self._asked = -math.inf
        """When the last request came."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to admit jobs; threads that begin from now on have as many of PyTorch's."""
        _keep_memory()
        torch.set_num_threads(self._threads)
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
        self._answer_all(NotReady("The service is shutting down."))

    @property
    def ready(self) -> bool:
        """Whether jobs are admitted and the thread has lately come round."""
        idle = self.waiting == 0
        return self._open and self._thread.is_alive() and (idle or self._since_beat() < STUCK)

    @property
    def lost(self) -> bool:
        """Whether the device has failed, and with it this process."""
        return self._lost

    @property
    def waiting(self) -> int:
        """The cost of what was admitted and is not finished."""
        return sum(self._waiting.values())

    def refuse_early(self) -> None:
        """Refuses what has not been read yet, where it would be refused afterwards.

        Raises:
            Overloaded: Not long ago there was no room for a request, and there still is none.
        """
        with self._lock:
            self._full &= self._waiting[False] > ROOM * self._max_waiting
            if self._full:
                raise self._overloaded(self._waiting[False])

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
            most = max(PREPARATION.values())
            raise TooLarge.of(
                "particles",
                f"at most {self._max_request} in a request, over all its images, each with "
                f"whole blocks of {BLOCK}, up to {most} more of them, and its draws",
                str(cost),
            )
        tasks = [_Task(job, until, background) for job in jobs]
        with self._lock:
            if not self._open:
                raise NotReady(LOST if self._lost else "The service is starting or shutting down.")
            waiting = self._waiting[background]
            if waiting and waiting + cost > self._max_waiting:
                self._full |= not background
                raise self._overloaded(waiting)
            if not self.waiting:
                self._beat = time.monotonic()  # the thread has had nothing to come round for
            self._waiting[background] += cost
            self._admitted.update(tasks)
            for task in tasks:
                self._inbox.put(task)
        return tasks

    def _overloaded(self, waiting: int) -> Overloaded:
        self._refused += 1
        if time.monotonic() > self._told + TELLING:
            self._tell()
        seconds = max(1, math.ceil(waiting * self._spent / self._done))
        return Overloaded(waiting=waiting, limit=self._max_waiting, seconds=seconds)

    def _tell(self) -> None:
        """Has the log tell of the requests that were refused, if there are any."""
        if self._refused:
            log.warning("No room: %d refused since this was last said.", self._refused)
            self._refused, self._told = 0, time.monotonic()

    def _run(self) -> None:
        stopping = False
        with torch.inference_mode():
            while not (stopping and self._idle):
                stopping |= self._receive(block=self._idle and not stopping)
                try:
                    self._work()
                except Exception:
                    log.exception("The engine failed, and with it all that was admitted.")
                    self._forget(Failed("The engine failed; its log says why."))
                if self._idle:
                    with self._lock:
                        self._tell()

    @property
    def _idle(self) -> bool:
        return not (self._requests or self._background or self._groups)

    def _receive(self, *, block: bool) -> bool:
        """Moves what has come to what waits; says whether the end is among it."""
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
                self._asked = self._asked if task.background else time.monotonic()
                self._queue(task).put(task)

    def _work(self) -> None:
        self._sweep()
        self._begin()
        if (group := self._turn()) is not None:
            self._advance(group)
        self._groups = [group for group in self._groups if group.tasks]

    def _sweep(self) -> None:
        """Drops what nobody waits for any more, now and then."""
        now = time.monotonic()
        if now - self._swept < SWEEPING and now < self._deadline:
            return
        self._swept = now
        for waiting in (self._requests, self._background):
            waiting.drop(lambda task: self._ended(task, begun=False))

    def _begin(self) -> None:
        """Begins as much of what waits as there may be at once, what is alike together."""
        if not (self._requests or self._background):
            return
        room = self._at_once - sum(len(group.tasks) for group in self._groups)
        while room > 0 and (taken := self._next(room)):
            tasks = [task for task in taken if not self._ended(task, begun=False)]
            if tasks:
                places = {id(task): place for place, task in enumerate(tasks)}
                self._groups.append(_Group(tasks, _stages(tasks), places, tasks[0].kind))
                room -= len(tasks)

    def _next(self, room: int) -> list[_Task]:
        """Requests that are alike, or else some of the background where no requests are left.

        What is alike to something that is being worked on waits for its end, and for others that
        are alike: it is then done in less time than by turns.
        """
        alone = self._threads > 1
        kinds = set() if alone else {group.kind for group in self._groups}
        count = 1 if alone else min(TOGETHER, room)
        if tasks := self._requests.take(count, besides=kinds):
            return tasks
        begun = [group for group in self._groups if group.background]
        if len(begun) < len(self._groups):  # requests are worked on
            first = self._background.next
            may = not begun and first is not None and _overdue(first)
        else:  # half of the room is for requests that may come
            may = sum(len(group.tasks) for group in begun) < max(1, self._at_once // 2)
        if time.monotonic() < self._asked + QUIET:  # the next request shall not wait for many
            count = min(count, FEW)
        return self._background.take(count, besides=kinds) if may else []

    def _turn(self) -> _Group | None:
        """Whose stage is next: among all requests, or else in the background, who had least.

        One that has been in the background for long is one beside the requests.
        """
        if len(self._groups) == 1:  # a lone request shall not wait for choices beside its stages
            return self._groups[0]
        requests = [group for group in self._groups if not group.background]
        background = (group for group in self._groups if group.background)
        least = sorted(background, key=lambda group: group.had)[:1]
        may = requests + [group for group in least if group.overdue or not requests]
        return min(may, key=lambda group: group.had, default=None)

    def _ended(self, task: _Task, *, begun: bool) -> bool:
        """Whether nobody waits for it any more, or not in time."""
        now = time.monotonic()
        if task.future.done():
            self._leave(task)
        elif now > self._deadline:
            self._answer(task, problem=NotReady("The service is shutting down."))
        elif now > task.until:
            self._answer(task, problem=Expired(begun=begun))
        else:
            return False
        return True

    def _advance(self, group: _Group) -> None:
        """Does a group's next stage; a group that has no tasks left is done."""
        started = self._beat = time.monotonic()
        self._virtual_time = group.had = max(group.had, self._virtual_time)
        group.tasks = [task for task in group.tasks if not self._ended(task, begun=True)]
        if not group.tasks:
            return
        try:
            self._step(group, started)
        except Problem as problem:
            self._give_up(group, problem)
        except torch.OutOfMemoryError:
            self._begin_again(group)
        except Exception:
            log.exception("A job failed.")
            if _device_lost():
                self._lose()
            else:
                self._give_up(group, Failed("The model failed on this image."))

    def _step(self, group: _Group, started: float) -> None:
        results: list[Any] | None = None
        try:
            next(group.stages)
        except StopIteration as done:
            results = done.value
        each = (time.monotonic() - started) / len(group.tasks)
        group.had += each
        for task in group.tasks:
            task.seconds += each
        if results is None:
            return
        while group.tasks:
            task = group.tasks[0]
            result = results[group.places[id(task)]]
            job = task.job.instead(result)
            self._measure(task)
            group.tasks.pop(0)  # where this fails the rest is left
            if job is None or job.cost > self._max_request:
                self._answer(task, result=result)
            else:
                self._replace(task, job)
                self._queue(task).put_back(task)

    def _give_up(self, group: _Group, problem: Problem) -> None:
        """Answers the one that has failed; of several each is tried alone."""
        for task in group.tasks:
            if len(group.tasks) == 1:
                self._answer(task, problem=problem)
            else:
                task.kind = None  # alone it is seen which of them it was
                self._put_back(task)
        group.tasks = []

    def _lose(self) -> None:
        """Ends for want of a device: what was admitted is no worse for it, and may come again."""
        log.critical(LOST)
        with self._lock:
            self._open, self._lost = False, True
        self._forget(NotReady(LOST))
        self._on_lost()

    def _forget(self, problem: Problem) -> None:
        """Answers all with this."""
        self._requests, self._background, self._groups = _Queue(), _Queue(), []
        self._answer_all(problem)

    def _begin_again(self, group: _Group) -> None:
        """Forgets half of what was begun, which has the same answers when it is done later."""
        begun = [each for each in self._groups if each.tasks and each is not group]
        self._at_once = max(1, sum(len(each.tasks) for each in [group, *begun]) // 2)
        log.warning("The device has no memory: %d images are worked on at once.", self._at_once)
        for each in [*reversed(begun[len(begun) // 2 :]), group]:
            for task in each.tasks:
                if each is group and task.again:
                    problem = Failed("The device has no memory for this image.")
                    self._answer(task, problem=problem)
                else:
                    task.again |= each is group
                    self._put_back(task)
            each.tasks = []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _put_back(self, task: _Task) -> None:
        task.restart()
        self._queue(task).put_back(task)

    def _queue(self, task: _Task) -> _Queue:
        return self._background if task.background else self._requests

    def _replace(self, task: _Task, job: Job) -> None:
        """Begins another job for the same answer; it was admitted, and is not refused now."""
        with self._lock:
            if task in self._admitted:
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

    def _answer_all(self, problem: Problem) -> None:
        with self._lock:
            left = list(self._admitted)
        for task in left:
            self._answer(task, problem=problem)

    def _leave(self, task: _Task) -> None:
        with self._lock:
            if task in self._admitted:
                self._admitted.remove(task)
                self._waiting[task.background] -= task.job.cost

    def _measure(self, task: _Task) -> None:
        """Counts a finished task in the rate, the latest the most."""
        self._at_once = min(self._at_once + 1, AT_ONCE)
        with self._lock:
            self._done = 0.9 * self._done + task.job.cost
            self._spent = 0.9 * self._spent + task.seconds

    def _since_beat(self) -> float:
        return time.monotonic() - self._beat


def _device_lost() -> bool:
    """Whether the GPU does nothing more for this process, as after some errors."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def _keep_memory() -> None:
    """Tells the C library to keep what is freed for the next stage.

    By default it gives the arrays of every stage back to the system, which has to find and clear
    them anew. Other libraries than glibc are left as they are.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in MALLOPT.items():
            mallopt(option, value)


MALLOPT = {-8: 1, -3: 2**25, -1: 2**31 - 1}
"""Of malloc.h: one arena; bytes from which memory is not kept; bytes that may be kept."""
LOST = "The device has failed, and with it this process: another has to take its place."
AT_ONCE = 256
"""Images that are begun and not ended; each holds a few arrays of its size."""
TOGETHER = 16
"""Images of requests that are alike whose work is done by the same operations."""
FEW, QUIET = 1, 10.0
"""Those of the background, until so many seconds have passed without a request."""
ROOM = 0.95
"""Of what may wait, where a queue that was full takes requests again."""
SWEEPING = 0.05
"""Seconds after which what waits is looked through for what nobody waits for."""
TELLING = 10.0
"""Seconds for which the log does not repeat that requests are refused, while there is work."""
PATIENCE = 60.0
"""Seconds after which work in the background has a turn beside the requests."""
STUCK = 30.0
"""Seconds after which an engine that has not come round is not ready: no stage takes so long."""
