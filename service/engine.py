"""The engine: one thread that owns the model, and the only part of the service that imports it.

Work is one image at a time in blocks of particles. Every round takes one block from each image
that is being worked on, so that no request waits for another's thousand blocks; an image never
shares a computation with another, so that its answer has the same bits whoever its neighbours are.
Admission is bounded by particles that wait, and refuses beyond; what was cancelled is dropped at
its next block; an image that fails, fails alone.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from model import checkpoint, estimators, imputation, likelihood
from model.checkpoint import Card, Checkpoint, CheckpointError
from model.estimators import QUALITIES
from model.likelihood import Stages
from model.masks import Incomplete
from model.noise import MAX_SEED, Noise, NoisePerImage, image_seed
from service.errors import Failed, NotReady, Overloaded, Problem, TooLarge, UnknownModel

__all__ = [
    "FEWEST",
    "MAX_SEED",
    "Card",
    "Engine",
    "Estimate",
    "Imputation",
    "Impute",
    "Job",
    "Quality",
    "Sample",
    "Score",
    "Scoring",
    "image_seed",
]

log = logging.getLogger(__name__)
Quality = Literal["fast", "standard", "high"]


@dataclass(frozen=True)
class Estimate:
    """An estimate of a log-probability of one image."""

    value: float
    standard_error: float
    effective_sample_size: float
    pareto_k: float | None
    reliable: bool
    particles: int
    estimator: str
    kind: str
    acceptance: float | None


@dataclass(frozen=True)
class Imputation:
    """What an image's holes may have held; floats from 0 to 1, channels first."""

    mean: np.ndarray
    std: np.ndarray
    draws: np.ndarray
    quantiles: np.ndarray
    log_likelihood: Estimate
    doubtful: bool
    quality: Quality


@dataclass(frozen=True)
class Scoring:
    """How likely an image is."""

    log_likelihood: Estimate
    conditional: Estimate | None
    difference: Estimate | None
    doubtful: bool
    quality: Quality | None


@dataclass(frozen=True, kw_only=True)
class Impute:
    """The job of completing one image."""

    model: str
    values: np.ndarray
    missing: np.ndarray
    particles: int
    draws: int
    seed: int
    levels: tuple[float, ...] = ()
    quality: Quality = "standard"
    escalates: bool = False
    """Whether a doubtful answer is not given but the work done again in high quality."""

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        return PREPARATION_ROWS + imputation.rows(
            QUALITIES[self.quality].estimator,
            self.particles,
            draws=self.draws,
            quantiles=bool(self.levels),
        )

    def stages(self, model: checkpoint.LatentVariableModel) -> Stages[Imputation]:
        """The work, a block at a time."""
        quality = QUALITIES[self.quality]
        done = yield from imputation.impute(
            model,
            _incomplete(self.values, self.missing, model),
            NoisePerImage.of(self.seed, [0]),
            particles=self.particles,
            draws=self.draws,
            levels=self.levels,
            proposal=quality.proposal,
            estimator=quality.estimator,
        )
        return Imputation(
            done.mean[0].cpu().numpy(),
            done.std[0].cpu().numpy(),
            done.draws[0].cpu().numpy(),
            done.quantiles[0].cpu().numpy(),
            _estimate(done.log_likelihood),
            bool(estimators.doubtful(done.log_likelihood).item()),
            self.quality,
        )

    def instead(self, result: Imputation) -> "Impute | None":
        """The job that is to be done where this result is in doubt."""
        return _harder(self) if self.escalates and result.doubtful else None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The job of scoring one image."""

    model: str
    values: np.ndarray
    missing: np.ndarray
    truth: np.ndarray | None
    particles: int
    seed: int
    estimator: str | None = None
    """In place of that of the quality."""
    quality: Quality = "standard"
    escalates: bool = False
    """Whether a doubtful answer is not given but the work done again in high quality."""

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        truth, way = self.truth is not None, self._way
        proposals = estimators.looks(way, truth=truth) * PREPARATION_ROWS
        return estimators.assessment_rows(way, self.particles, truth=truth) + proposals

    @property
    def _way(self) -> estimators.Quality:
        quality = QUALITIES[self.quality]
        return replace(quality, estimator=self.estimator or quality.estimator)

    def stages(self, model: checkpoint.LatentVariableModel) -> Stages[Scoring]:
        """The work, a block at a time."""
        truth = None if self.truth is None else _seen(self.truth, model)[None]
        found = yield from estimators.assess(
            model,
            _incomplete(self.values, self.missing, model),
            NoisePerImage.of(self.seed, [0]),
            quality=self._way,
            particles=self.particles,
            truth=truth,
        )
        return Scoring(
            _estimate(found.log_likelihood),
            found.conditional and _estimate(found.conditional),
            found.difference and _estimate(found.difference),
            bool(estimators.doubtful(found.log_likelihood).item()),
            None if self.estimator else self.quality,
        )

    def instead(self, result: Scoring) -> "Score | None":
        """The job that is to be done where this result is in doubt."""
        return _harder(self) if self.escalates and result.doubtful else None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The job of drawing images from the model."""

    model: str
    count: int
    seed: int

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        return self.count

    def stages(self, model: checkpoint.LatentVariableModel) -> Stages[np.ndarray]:
        """The work, an image at a time."""
        images: list[np.ndarray] = []
        for index in range(self.count):
            images.append(model.sample(1, Noise(image_seed(self.seed, index)))[0].cpu().numpy())
            yield
        return np.stack(images)

    def instead(self, _result: np.ndarray) -> None:
        """Nothing: a sample is never in doubt."""


Job = Impute | Score | Sample
Escalating = TypeVar("Escalating", Impute, Score)


def _harder(job: Escalating) -> Escalating:
    return replace(job, quality="high", escalates=False)


@dataclass
class _Task:
    """A job on its way."""

    job: Job
    future: Future[Any] = field(default_factory=Future)
    stages: Stages[Any] | None = None
    seconds: float = 0.0
    """That the device has spent on it."""


class Engine:
    """Admits jobs, works on them in turn, and answers each exactly once."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        device: str = "auto",
        threads: int = 1,
        max_request: int = 2_000_000,
        max_waiting: int = 4_000_000,
    ) -> None:
        self._folder = checkpoints
        self._device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self._threads = threads
        self._max_request, self._max_waiting = max_request, max_waiting
        self._models: dict[str, Checkpoint] = {}
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._waiting = 0
        self._done, self._spent = 50_000.0, 1.0
        self._open = False
        self._deadline = math.inf
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Loads every checkpoint and begins to admit jobs.

        Raises:
            CheckpointError: A checkpoint that cannot be trusted, or none at all.
        """
        for name in self._names():
            self._read(name)
        if not self._models:
            raise CheckpointError(f"Expected checkpoints in {self._folder}; got none.")
        _warm(next(iter(self._models.values())).model)
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
        idle = self._waiting == 0
        return self._open and self._thread.is_alive() and (idle or self._since_beat() < STUCK)

    @property
    def waiting(self) -> int:
        """The cost of what was admitted and is not finished."""
        return self._waiting

    def cards(self) -> dict[str, Card]:
        """The card of each model that can be used, by name."""
        for name in self._names():
            try:
                self._read(name)
            except CheckpointError as error:
                log.warning("A checkpoint was passed over: %s", error)
        return {name: self._models[name].card for name in sorted(self._models)}

    def card(self, name: str) -> Card:
        """A model's card; a folder that has appeared since the start counts.

        Raises:
            UnknownModel: There is no such model.
        """
        if name not in self._models and name in self._names():
            try:
                self._read(name)
            except CheckpointError as error:
                raise Failed(str(error)) from error
        if name not in self._models:
            known = ", ".join(sorted(self._models))
            raise UnknownModel.of("model", f"one of {known}", repr(name[:80]))
        return self._models[name].card

    async def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """The results of one request's jobs, in their order; leaving early drops the work.

        Raises:
            TooLarge: The jobs are more than any request may bring.
            Overloaded: Too much is waiting.
            NotReady: The engine is starting or stopping.
        """
        tasks = self._admit(jobs)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))
        finally:
            for task in tasks:
                task.future.cancel()

    def _admit(self, jobs: Sequence[Job]) -> list[_Task]:
        cost = sum(job.cost for job in jobs)
        if cost > self._max_request:
            raise TooLarge.of(
                "particles",
                f"at most {self._max_request} in a request, over all its images, each with "
                f"whole blocks of {likelihood.BLOCK}, {PREPARATION} more of them, and its draws",
                str(cost),
            )
        tasks = [_Task(job) for job in jobs]
        with self._lock:
            if not self._open:
                raise NotReady("The service is starting or shutting down.")
            if self._waiting and self._waiting + cost > self._max_waiting:
                seconds = math.ceil(self._waiting * self._spent / self._done)
                raise Overloaded(
                    waiting=self._waiting + cost, limit=self._max_waiting, seconds=seconds
                )
            if not self._waiting:
                self._beat = time.monotonic()  # the thread has had nothing to come round for
            self._waiting += cost
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
                active = [task for task in active if self._advance(task)]

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

    def _advance(self, task: _Task) -> bool:
        """Does a task's next block; says whether there are more."""
        started = self._beat = time.monotonic()
        if task.future.cancelled():
            self._leave(task)
            return False
        try:
            if started > self._deadline:
                raise NotReady("The service is shutting down.")  # noqa: TRY301
            return self._step(task, started)
        except Problem as problem:
            self._answer(task, problem=problem)
        except Exception:
            log.exception("A job failed.")
            self._answer(task, problem=Failed("The model failed on this image."))
        return False

    def _step(self, task: _Task, started: float) -> bool:
        if task.stages is None:
            task.stages = task.job.stages(self._models[task.job.model].model)
        try:
            next(task.stages)
        except StopIteration as done:
            self._measure(task)
            if (job := task.job.instead(done.value)) is None:
                self._answer(task, result=done.value)
                return False
            self._replace(task, job)
        else:
            task.seconds += time.monotonic() - started
        return True

    def _replace(self, task: _Task, job: Job) -> None:
        """Begins another job for the same answer; it was admitted, and is not refused now."""
        with self._lock:
            self._waiting += job.cost - task.job.cost
            task.job, task.stages, task.seconds = job, None, 0.0

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
        with self._lock:
            self._waiting -= task.job.cost

    def _measure(self, task: _Task) -> None:
        """Counts a finished task in the rate, the latest the most."""
        with self._lock:
            self._done = 0.9 * self._done + task.job.cost
            self._spent = 0.9 * self._spent + task.seconds

    def _since_beat(self) -> float:
        return time.monotonic() - self._beat

    def _read(self, name: str) -> None:
        with self._reading:
            if name not in self._models:
                self._models[name] = checkpoint.read(self._folder / name, device=self._device)

    def _names(self) -> list[str]:
        if not self._folder.is_dir():
            return []
        found = [p.parent.name for p in self._folder.glob("[!.]*/card.json")]
        return sorted(found)


STUCK = 30.0
"""Seconds after which an engine that has not come round is not ready: no block takes so long."""
FEWEST = {name: order * likelihood.BLOCK + 1 for name, order in estimators.ORDERS.items()}
"""Particles that an estimator needs, where it needs more than one."""
PREPARATION = 16
"""Blocks that an image's proposal costs before its first particle, most of them derivatives."""
PREPARATION_ROWS = PREPARATION * likelihood.BLOCK


def _warm(model: checkpoint.LatentVariableModel) -> None:
    """Scores a blank image: what PyTorch loads at its first use shall not wait for a request."""
    values = torch.zeros(1, *model.architecture.image_shape, device=model.device)
    blank = Incomplete.hide(values, torch.zeros_like(values, dtype=torch.bool))
    with torch.inference_mode():
        likelihood.finish(likelihood.score(model, blank, NoisePerImage.of(0, [0]), particles=1))


def _incomplete(
    values: np.ndarray, missing: np.ndarray, model: checkpoint.LatentVariableModel
) -> Incomplete:
    seen = torch.from_numpy(~missing).expand(values.shape).to(model.device)
    return Incomplete.hide(_seen(values, model)[None], seen[None])


def _seen(values: np.ndarray, model: checkpoint.LatentVariableModel) -> torch.Tensor:
    """The pixels as the model sees them: grey levels above 127 are one where it is binary."""
    if model.likelihood.binary:
        values = values > THRESHOLD
    return torch.from_numpy(values).float().to(model.device)


THRESHOLD = 127.5 / 255


def _estimate(estimate: likelihood.Estimate) -> Estimate:
    k = estimate.pareto_k.item()
    return Estimate(
        value=estimate.value.item(),
        standard_error=estimate.standard_error.item(),
        effective_sample_size=estimate.effective_sample_size.item(),
        pareto_k=k if math.isfinite(k) else None,
        reliable=bool(estimate.reliable.item()),
        particles=estimate.particles,
        estimator=estimate.estimator,
        kind=estimate.kind,
        acceptance=None if estimate.acceptance is None else estimate.acceptance.item(),
    )
