r"""Estimators of log p(x_o), by name.

Each takes a model, images, randomness, a number of particles and a proposal, and gives an
`Estimate` that says what kind of number it is.

| name | what | kind |
|---|---|---|
| `prior` | the mean of p(x_o \| z) over the prior | lower bound |
| `importance` | the mean of the weights of a proposal | lower bound |
| `jackknife`, `jackknife-2` | the same, its bias of order 1/K (and 1/K²) removed | debiased |
| `adaptive` | importance with a proposal that has learned from its own weights | lower bound |
| `annealed` | annealed importance sampling with Hamiltonian transitions | lower bound |

The jackknife leaves out groups of particles, of which it needs only the sums of the weights.
With $L_{n-j}$ the mean over all ways to leave out $j$ of $n$ groups it is

$$ \sum_{j=0}^m (-1)^j \frac{(n-j)^m}{(m-j)!\, j!} L_{n-j} $$

(Nowozin, "Debiasing evidence approximations: on importance-weighted autoencoders and jackknife
variational inference", 2018), of order $m$; its standard error is that of the groups left out one
by one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from model.adaptation import PER_ROUND, ROUNDS, adaptive
from model.annealing import LEAPFROGS, Chains, annealed
from model.latent import EXACT, LatentVariableModel
from model.likelihood import (
    BLOCK,
    Estimate,
    blocks,
    encode,
    estimate_of,
    modes,
    proposed,
    score,
)
from model.masks import Incomplete
from model.noise import Source
from model.proposal import CorrelatedMixture, PriorProposal, Proposal
from model.stages import Stages
from model.weights import WeightSums

__all__ = [
    "CHAINS",
    "ESTIMATORS",
    "ORDERS",
    "QUALITIES",
    "Asked",
    "Assessment",
    "Quality",
    "annealed_estimate",
    "assess",
    "assessment_rows",
    "chains",
    "difference",
    "estimate",
    "looks",
    "rows",
]

GROUPS = 64
"""The most that the jackknife leaves out one by one."""
CHAINS = 32
"""Of annealed importance sampling."""
PER_TEMPERATURE, FEWEST_TEMPERATURES = 25, 20
"""Particles that a temperature stands for, and the temperatures below which chains are useless."""


@dataclass(frozen=True)
class Quality:
    """A way to look at an image's posterior."""

    estimator: str
    proposal: str


IMPORTANCE = "importance"
QUALITIES = {
    "fast": Quality(IMPORTANCE, "amortised"),
    "standard": Quality(IMPORTANCE, "laplace"),
    "high": Quality("annealed", "laplace"),
}


def estimate(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    estimator: str = "importance",
    particles: int = 1000,
    proposal: str | Proposal = "laplace",
    tolerance: float | None = None,
) -> Stages[Estimate]:
    """Log p(x_o) of each image by the estimator of this name.

    With a tolerance, a standard error in nats, those that may stop draw no more particles than
    it takes.

    Raises:
        ValueError: There is no such estimator, or there are too few particles for it.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"Expected an estimator of {', '.join(ESTIMATORS)}; got {estimator!r}.")
    if model.exact is not None:
        scores = yield from score(model, images, noise, particles=particles)
        return scores.log_likelihood
    asked = Asked(model, images, noise, particles, proposal, tolerance)
    found = yield from ESTIMATORS[estimator](asked)
    return replace(found, estimator=estimator)


@dataclass(frozen=True)
class Assessment:
    """log p(x_o), and where the truth was given log p(x_m | x_o) in two ways."""

    log_likelihood: Estimate
    conditional: Estimate | None
    """By self-normalised weights: a distribution over x_m whatever the particles are."""
    difference: Estimate | None
    """log p(x) − log p(x_o)."""


def assess(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    quality: Quality,
    particles: int,
    truth: Float[Tensor, "batch channels height width"] | None = None,
    tolerance: float | None = None,
) -> Stages[Assessment]:
    """How likely the images are, and what was behind their holes.

    With a tolerance, no more particles are drawn than it takes; chains have one length.
    """

    def at(images: Incomplete, noise: Source) -> Stages[Estimate]:
        return estimate(
            model,
            images,
            noise,
            estimator=quality.estimator,
            particles=particles,
            proposal=quality.proposal,
            tolerance=tolerance,
        )

    if truth is None:
        return Assessment((yield from at(images, noise)), None, None)
    scores = yield from score(
        model,
        images,
        noise,
        particles=_predictive_particles(quality, particles),
        proposal=quality.proposal,
        truth=truth,
        tolerance=tolerance,
    )
    found = scores.log_likelihood
    if quality.estimator != IMPORTANCE:
        found = yield from at(images, noise)
    whole = yield from at(Incomplete.complete(images.fill(truth)), noise.at("whole"))
    return Assessment(found, scores.conditional, difference(whole, found))


def assessment_rows(quality: Quality, particles: int, *, truth: bool) -> int:
    """What an assessment costs beside its looks, in rows of the decoder."""
    once = rows(quality.estimator, particles)
    if not truth:
        return once
    predictive = rows(IMPORTANCE, _predictive_particles(quality, particles))
    return predictive + once * (1 if quality.estimator == IMPORTANCE else 2)


def looks(quality: Quality, *, truth: bool) -> int:
    """How many proposals an assessment makes."""
    if not truth:
        return 1
    return 2 if quality.estimator == IMPORTANCE else 3


def _predictive_particles(quality: Quality, particles: int) -> int:
    """Chains are too few for a mixture over x_m; what they cost is spent on more particles."""
    return MORE * particles if quality.estimator == "annealed" else particles


MORE = 8


@dataclass(frozen=True)
class Asked:
    """What an estimator is asked for."""

    model: LatentVariableModel
    images: Incomplete
    noise: Source
    particles: int
    proposal: str | Proposal
    tolerance: float | None = None


def rows(estimator: str, particles: int) -> int:
    """What an estimate costs beside its proposal, in rows of the decoder; a gradient is three."""
    blocks_of = math.ceil(particles / BLOCK) * BLOCK
    if estimator == "annealed":
        return _temperatures(particles) * CHAINS * 3 * LEAPFROGS
    if estimator == "adaptive":
        return blocks_of + ROUNDS * PER_ROUND
    if estimator in ORDERS:
        size, count = _groups(particles, ORDERS[estimator])
        return size * count
    return blocks_of


Estimator = Callable[[Asked], Stages[Estimate]]


def _importance(asked: Asked) -> Stages[Estimate]:
    scores = yield from score(
        asked.model,
        asked.images,
        asked.noise,
        particles=asked.particles,
        proposal=asked.proposal,
        tolerance=asked.tolerance,
    )
    return scores.log_likelihood


def _prior(asked: Asked) -> Stages[Estimate]:
    prior = PriorProposal(asked.model.prior, asked.images.values)
    return _importance(replace(asked, proposal=prior))


def _adaptive(asked: Asked) -> Stages[Estimate]:
    model, images, noise = asked.model, asked.images, asked.noise
    begun = yield from proposed(model, images, noise.at("proposal"), asked.proposal)
    learned = yield from adaptive(model, images, begun, noise.at("adaptive"))
    return (yield from _importance(replace(asked, proposal=learned)))


def _annealed(asked: Asked) -> Stages[Estimate]:
    found = yield from chains(asked)
    return annealed_estimate(found)


def annealed_estimate(found: Chains) -> Estimate:
    """What the chains' weights say of log p(x_o)."""
    log_w = found.log_weights
    sums = WeightSums.empty(len(log_w), particles=log_w.shape[1], like=log_w)
    whole = estimate_of(sums.update(log_w))
    return replace(whole, estimator="annealed", acceptance=found.acceptance)


def chains(asked: Asked, *, further: int = 0) -> Stages[Chains]:
    """Annealed chains, through more temperatures the more particles, and further states of each.

    They begin at the Gaussians of a correlated mixture, or else at those of Laplace's.
    """
    model, images, start = asked.model, asked.images, asked.proposal
    if not isinstance(start, CorrelatedMixture):
        source = asked.noise.at("proposal")
        start = yield from modes(model, images, encode(model, images, source), source)
    components = start.mean.shape[1]
    return (
        yield from annealed(
            model,
            images,
            start,
            asked.noise.at("annealed"),
            temperatures=_temperatures(asked.particles),
            chains=math.ceil(CHAINS / components) * components,
            further=further,
        )
    )


def _temperatures(particles: int) -> int:
    return max(FEWEST_TEMPERATURES, math.ceil(particles / PER_TEMPERATURE))


def difference(whole: Estimate, seen: Estimate) -> Estimate:
    """Log p(x) − log p(x_o), which is log p(x_m | x_o), from independent estimates of the two.

    It is as good as both are, but no distribution over x_m: where the second falls short of the
    truth by more than the first, it flatters.
    """
    return Estimate(
        value=whole.value - seen.value,
        standard_error=(whole.standard_error**2 + seen.standard_error**2).sqrt(),
        effective_sample_size=torch.minimum(
            whole.effective_sample_size, seen.effective_sample_size
        ),
        pareto_k=torch.maximum(whole.pareto_k, seen.pareto_k),
        particles=seen.particles,
        estimator=seen.estimator,
        kind=EXACT if whole.kind == seen.kind == EXACT else "difference",
    )


def _jackknife(order: int) -> Estimator:
    def debiased(asked: Asked) -> Stages[Estimate]:
        size, count = _groups(asked.particles, order)
        images, total = asked.images, size * count
        sums = WeightSums.empty(len(images), particles=total, like=images.values)
        by_block: list[Float[Tensor, "batch blocks"]] = []
        proposal = yield from proposed(
            asked.model, images, asked.noise.at("proposal"), asked.proposal
        )
        for block in blocks(
            asked.model,
            images,
            asked.noise,
            particles=total,
            proposal=proposal,
            keep=False,
        ):
            sums = sums.update(block.log_weights)
            by_block.append(block.log_weights.double().unflatten(-1, (-1, BLOCK)).logsumexp(-1))
            yield
        log_sums = torch.cat(by_block, -1).unflatten(-1, (count, -1)).logsumexp(-1)
        value, error = _leaving_out(log_sums, size, order)
        return replace(estimate_of(sums), value=value, standard_error=error, kind="debiased")

    return debiased


def _groups(particles: int, order: int) -> tuple[int, int]:
    """How many particles a group has, whole blocks, and how many groups there are.

    Raises:
        ValueError: There would be too few groups to leave any out.
    """
    count = math.ceil(particles / BLOCK)
    if count <= order:
        raise ValueError(
            f"Expected more than {order * BLOCK} particles with jackknife of order {order}; "
            f"got {particles}."
        )
    size = math.ceil(count / GROUPS)
    return size * BLOCK, math.ceil(count / size)


def _leaving_out(
    log_sums: Float[Tensor, "batch groups"], size: int, order: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The jackknife of the logarithm of the weights' mean, and its standard error."""
    count = log_sums.shape[-1]
    value = torch.zeros_like(log_sums[:, 0])
    error = value
    for left_out in range(order + 1):
        ways = torch.combinations(torch.arange(count), left_out) if left_out else None
        kept = torch.ones(1 if ways is None else len(ways), count, dtype=torch.bool)
        if ways is not None:
            kept.scatter_(1, ways, value=False)
        masked = log_sums[:, None].masked_fill(~kept.to(log_sums.device), -torch.inf)
        each = masked.logsumexp(-1) - math.log(size * (count - left_out))
        value = value + _coefficient(count, order, left_out) * each.mean(-1)
        if left_out == 1:
            error = ((count - 1) * each.var(-1, correction=0)).sqrt()
    return value, error


def _coefficient(count: int, order: int, left_out: int) -> float:
    factorials = math.factorial(order - left_out) * math.factorial(left_out)
    return (-1) ** left_out * (count - left_out) ** order / factorials


ORDERS = {"jackknife": 1, "jackknife-2": 2}
ESTIMATORS: dict[str, Estimator] = {
    "prior": _prior,
    IMPORTANCE: _importance,
    **{name: _jackknife(order) for name, order in ORDERS.items()},
    "adaptive": _adaptive,
    "annealed": _annealed,
}
