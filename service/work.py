"""The jobs: one image each, and the work on it in stages that are not long.

A job holds the model that it is for, so that what is being worked on stays as it is while models
are replaced. It says what it costs before it is begun.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch

from model import estimators, imputation, likelihood
from model.estimators import QUALITIES
from model.latent import LatentVariableModel
from model.likelihood import BLOCK
from model.masks import Incomplete
from model.noise import MAX_SEED, Noise, NoisePerImage, image_seed
from model.stages import Stages
from service.models import Model

__all__ = [
    "BLOCK",
    "FEWEST",
    "MAX_SEED",
    "PREPARATION",
    "STOPPING",
    "Estimate",
    "Imputation",
    "Impute",
    "Job",
    "Quality",
    "Sample",
    "Score",
    "Scoring",
    "Stages",
    "image_seed",
]

Quality = Literal["fast", "standard", "high"]


class Job(Protocol):
    """Work on one image, or for one answer, as the engine sees it."""

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        ...

    @property
    def alike(self) -> Hashable:
        """What jobs that can be worked on together have in common; None for one that cannot."""
        ...

    def together(self, jobs: Sequence[Any], /) -> Stages[list[Any]]:
        """The work on jobs that are alike, this among them, in stages."""
        ...

    def instead(self, result: Any, /) -> "Job | None":
        """The job that is to be done in place of giving this result; None where it is good."""
        ...


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

    model: Model
    values: np.ndarray
    missing: np.ndarray
    particles: int
    draws: int
    seed: int
    levels: tuple[float, ...] = ()
    tolerance: float | None = None
    """A standard error, in nats, that more particles are not to be drawn for."""
    quality: Quality = "standard"
    escalates: bool = False
    """Whether a doubtful answer is not given but the work done again in high quality."""

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        return PREPARATION[self.quality] * BLOCK + imputation.rows(
            QUALITIES[self.quality].estimator,
            self.particles,
            resampled=self.draws + imputation.mixed(self.model.network, self.levels),
        )

    @property
    def alike(self) -> Hashable:
        """What jobs that can be worked on together have in common; None for one that cannot."""
        if self.quality == "high" or self.tolerance is not None or not self.model.together:
            return None
        return Impute, id(self.model), self.particles, self.draws, self.levels, self.quality

    @staticmethod
    def together(jobs: Sequence["Impute"]) -> Stages[list[Imputation]]:
        """The work on one, or on several that are alike, in stages."""
        first, quality = jobs[0], QUALITIES[jobs[0].quality]
        done = yield from imputation.impute(
            first.model.network,
            _incomplete(jobs, first.model.network),
            _noise(jobs),
            particles=first.particles,
            draws=first.draws,
            levels=first.levels,
            proposal=quality.proposal,
            estimator=quality.estimator,
            tolerance=first.tolerance,
        )
        arrays = (done.mean, done.std, done.draws, done.quantiles)
        mean, std, draws, quantiles = (array.cpu().numpy() for array in arrays)
        estimates = _estimates(done.log_likelihood)
        doubtful = done.log_likelihood.doubtful.tolist()
        return [
            Imputation(
                mean[index],
                std[index],
                draws[index],
                quantiles[index],
                estimates[index],
                doubtful[index],
                first.quality,
            )
            for index in range(len(jobs))
        ]

    def instead(self, result: Imputation) -> "Impute | None":
        """The job that is to be done where this result is in doubt."""
        return _harder(self) if self.escalates and result.doubtful else None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The job of scoring one image."""

    model: Model
    values: np.ndarray
    missing: np.ndarray
    truth: np.ndarray | None
    particles: int
    seed: int
    estimator: str | None = None
    """In place of that of the quality."""
    tolerance: float | None = None
    """A standard error, in nats, that more particles are not to be drawn for."""
    quality: Quality = "standard"
    escalates: bool = False
    """Whether a doubtful answer is not given but the work done again in high quality."""

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        truth, way = self.truth is not None, self._way
        proposals = estimators.looks(way, truth=truth) * PREPARATION[self.quality] * BLOCK
        return estimators.assessment_rows(way, self.particles, truth=truth) + proposals

    @property
    def _way(self) -> estimators.Quality:
        quality = QUALITIES[self.quality]
        return replace(quality, estimator=self.estimator or quality.estimator)

    @property
    def alike(self) -> Hashable:
        """What jobs that can be worked on together have in common; None for one that cannot."""
        simple = self.estimator in (None, "importance", "prior") and self.quality != "high"
        if not simple or self.tolerance is not None or not self.model.together:
            return None
        known = self.truth is not None
        return Score, id(self.model), self.particles, known, self.estimator, self.quality

    @staticmethod
    def together(jobs: Sequence["Score"]) -> Stages[list[Scoring]]:
        """The work on one, or on several that are alike, in stages."""
        first, network = jobs[0], jobs[0].model.network
        truths = [job.truth for job in jobs if job.truth is not None]
        found = yield from estimators.assess(
            network,
            _incomplete(jobs, network),
            _noise(jobs),
            quality=first._way,
            particles=first.particles,
            truth=_seen(np.stack(truths), network) if truths else None,
            tolerance=first.tolerance,
        )
        none = [None] * len(jobs)
        estimates, conditionals, differences = (
            none if estimate is None else _estimates(estimate)
            for estimate in (found.log_likelihood, found.conditional, found.difference)
        )
        doubtful = found.log_likelihood.doubtful.tolist()
        quality = None if first.estimator else first.quality
        return [
            Scoring(estimate, conditional, difference, doubt, quality)
            for estimate, conditional, difference, doubt in zip(
                estimates, conditionals, differences, doubtful, strict=True
            )
            if estimate is not None
        ]

    def instead(self, result: Scoring) -> "Score | None":
        """The job that is to be done where this result is in doubt."""
        return _harder(self) if self.escalates and result.doubtful else None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The job of drawing images from the model."""

    model: Model
    count: int
    seed: int

    @property
    def cost(self) -> int:
        """Rows that the decoder will see."""
        return self.count

    @property
    def alike(self) -> None:
        """Each is worked on alone."""

    @staticmethod
    def together(jobs: Sequence["Sample"]) -> Stages[list[np.ndarray]]:
        """The work, an image at a time."""
        (job,) = jobs
        images: list[np.ndarray] = []
        for index in range(job.count):
            noise = Noise(image_seed(job.seed, index))
            images.append(job.model.network.sample(1, noise)[0].cpu().numpy())
            yield
        return [np.stack(images)]

    def instead(self, _result: np.ndarray) -> None:
        """Nothing: a sample is never in doubt."""


Escalating = TypeVar("Escalating", Impute, Score)


def _harder(job: Escalating) -> Escalating:
    return replace(job, quality="high", escalates=False)


STOPPING = ("importance", "prior", "adaptive")
"""The estimators that draw no more particles than a tolerance takes."""
FEWEST = {name: order * BLOCK + 1 for name, order in estimators.ORDERS.items()}
"""Particles that an estimator needs, where it needs more than one."""
PREPARATION: dict[Quality, int] = {"fast": 1, "standard": 16, "high": 16}
"""Blocks that an image's proposal costs before its first particle, most of them derivatives."""


def _incomplete(
    jobs: Sequence[Impute] | Sequence[Score], network: LatentVariableModel
) -> Incomplete:
    values = np.stack([job.values for job in jobs])
    missing = np.stack([np.broadcast_to(job.missing, job.values.shape) for job in jobs])
    return Incomplete.hide(_seen(values, network), torch.from_numpy(~missing).to(network.device))


def _noise(jobs: Sequence[Impute] | Sequence[Score]) -> NoisePerImage:
    return NoisePerImage(tuple(Noise(image_seed(job.seed, 0)) for job in jobs))


def _seen(values: np.ndarray, network: LatentVariableModel) -> torch.Tensor:
    """The pixels as the model sees them: grey levels above 127 are one where it is binary."""
    if network.likelihood.binary:
        values = values > THRESHOLD
    return torch.from_numpy(values).float().to(network.device)


THRESHOLD = 127.5 / 255


def _estimates(found: likelihood.Estimate) -> list[Estimate]:
    """That of each image."""
    rows = zip(
        found.value.tolist(),
        found.standard_error.tolist(),
        found.effective_sample_size.tolist(),
        found.pareto_k.tolist(),
        found.reliable.tolist(),
        [None] * len(found.value) if found.acceptance is None else found.acceptance.tolist(),
        strict=True,
    )
    return [
        Estimate(
            value=value,
            standard_error=error,
            effective_sample_size=size,
            pareto_k=k if math.isfinite(k) else None,
            reliable=reliable,
            particles=found.particles,
            estimator=found.estimator,
            kind=found.kind,
            acceptance=acceptance,
        )
        for value, error, size, k, reliable, acceptance in rows
    ]
