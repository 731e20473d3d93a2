"""The jobs: one image each, and the work on it in stages that are not long.

A job holds the model that it is for, so that what is being worked on stays as it is while models
are replaced. It says what it costs before it is begun.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch

from model import estimators, imputation, likelihood
from model.estimators import QUALITIES
from model.latent import LatentVariableModel
from model.likelihood import BLOCK, Stages
from model.masks import Incomplete
from model.noise import MAX_SEED, Noise, NoisePerImage, image_seed
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
        return PREPARATION_ROWS + imputation.rows(
            QUALITIES[self.quality].estimator,
            self.particles,
            draws=self.draws,
            quantiles=bool(self.levels),
        )

    def stages(self) -> Stages[Imputation]:
        """The work, a block at a time."""
        quality, network = QUALITIES[self.quality], self.model.network
        done = yield from imputation.impute(
            network,
            _incomplete(self.values, self.missing, network),
            NoisePerImage.of(self.seed, [0]),
            particles=self.particles,
            draws=self.draws,
            levels=self.levels,
            proposal=quality.proposal,
            estimator=quality.estimator,
            tolerance=self.tolerance,
        )
        return Imputation(
            done.mean[0].cpu().numpy(),
            done.std[0].cpu().numpy(),
            done.draws[0].cpu().numpy(),
            done.quantiles[0].cpu().numpy(),
            _estimate(done.log_likelihood),
            bool(done.log_likelihood.doubtful.item()),
            self.quality,
        )

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
        proposals = estimators.looks(way, truth=truth) * PREPARATION_ROWS
        return estimators.assessment_rows(way, self.particles, truth=truth) + proposals

    @property
    def _way(self) -> estimators.Quality:
        quality = QUALITIES[self.quality]
        return replace(quality, estimator=self.estimator or quality.estimator)

    def stages(self) -> Stages[Scoring]:
        """The work, a block at a time."""
        network = self.model.network
        truth = None if self.truth is None else _seen(self.truth, network)[None]
        found = yield from estimators.assess(
            network,
            _incomplete(self.values, self.missing, network),
            NoisePerImage.of(self.seed, [0]),
            quality=self._way,
            particles=self.particles,
            truth=truth,
            tolerance=self.tolerance,
        )
        return Scoring(
            _estimate(found.log_likelihood),
            found.conditional and _estimate(found.conditional),
            found.difference and _estimate(found.difference),
            bool(found.log_likelihood.doubtful.item()),
            None if self.estimator else self.quality,
        )

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

    def stages(self) -> Stages[np.ndarray]:
        """The work, an image at a time."""
        images: list[np.ndarray] = []
        for index in range(self.count):
            noise = Noise(image_seed(self.seed, index))
            images.append(self.model.network.sample(1, noise)[0].cpu().numpy())
            yield
        return np.stack(images)

    def instead(self, _result: np.ndarray) -> None:
        """Nothing: a sample is never in doubt."""


Job = Impute | Score | Sample
Escalating = TypeVar("Escalating", Impute, Score)


def _harder(job: Escalating) -> Escalating:
    return replace(job, quality="high", escalates=False)


STOPPING = ("importance", "prior", "adaptive")
"""The estimators that draw no more particles than a tolerance takes."""
FEWEST = {name: order * BLOCK + 1 for name, order in estimators.ORDERS.items()}
"""Particles that an estimator needs, where it needs more than one."""
PREPARATION = 16
"""Blocks that an image's proposal costs before its first particle, most of them derivatives."""
PREPARATION_ROWS = PREPARATION * BLOCK


def _incomplete(
    values: np.ndarray, missing: np.ndarray, network: LatentVariableModel
) -> Incomplete:
    seen = torch.from_numpy(~missing).expand(values.shape).to(network.device)
    return Incomplete.hide(_seen(values, network)[None], seen[None])


def _seen(values: np.ndarray, network: LatentVariableModel) -> torch.Tensor:
    """The pixels as the model sees them: grey levels above 127 are one where it is binary."""
    if network.likelihood.binary:
        values = values > THRESHOLD
    return torch.from_numpy(values).float().to(network.device)


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
