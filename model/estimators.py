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
from model.latent import LatentVariableModel
from model.likelihood import (
    BLOCK,
    Estimate,
    Stages,
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
from model.weights import WeightSums

__all__ = ["CHAINS", "ESTIMATORS", "ORDERS", "Asked", "chains", "estimate", "rows"]

GROUPS = 64
"""The most that the jackknife leaves out one by one."""
CHAINS = 32
"""Of annealed importance sampling."""
PER_TEMPERATURE = 25
"""Particles that are worth a temperature: some 1300 states of chains cost what they are."""


def estimate(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    estimator: str = "importance",
    particles: int = 1000,
    proposal: str | Proposal = "laplace",
) -> Stages[Estimate]:
    """Log p(x_o) of each image by the estimator of this name.

    Raises:
        ValueError: There is no such estimator, or there are too few particles for it.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"Expected an estimator of {', '.join(ESTIMATORS)}; got {estimator!r}.")
    if model.exact is not None:
        scores = yield from score(model, images, noise, particles=particles)
        return scores.log_likelihood
    asked = Asked(model, images, noise, particles, proposal)
    found = yield from ESTIMATORS[estimator](asked)
    return replace(found, estimator=estimator)


@dataclass(frozen=True)
class Asked:
    """What an estimator is asked for."""

    model: LatentVariableModel
    images: Incomplete
    noise: Source
    particles: int
    proposal: str | Proposal


def rows(estimator: str, particles: int) -> int:
    """What an estimate costs beside its proposal, in rows of the decoder; a gradient is three."""
    blocks_of = math.ceil(particles / BLOCK) * BLOCK
    if estimator == "annealed":
        return math.ceil(particles / PER_TEMPERATURE) * CHAINS * (3 * (LEAPFROGS + 1) + 1)
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
    )
    return scores.log_likelihood


def _prior(asked: Asked) -> Stages[Estimate]:
    prior = PriorProposal(asked.model.prior, asked.images.values)
    return _importance(replace(asked, proposal=prior))


def _adaptive(asked: Asked) -> Stages[Estimate]:
    model, images, noise = asked.model, asked.images, asked.noise
    begun = proposed(model, images, noise.at("proposal"), asked.proposal)
    learned = yield from adaptive(model, images, begun, noise.at("adaptive"))
    return (yield from _importance(replace(asked, proposal=learned)))


def _annealed(asked: Asked) -> Stages[Estimate]:
    found = yield from chains(asked)
    sums = WeightSums.empty(len(asked.images), particles=CHAINS, like=asked.images.values)
    return estimate_of(sums.update(found.log_weights))


def chains(asked: Asked) -> Stages[Chains]:
    """Annealed chains, through more temperatures the more particles.

    They begin at the Gaussians of a correlated mixture, or else at those of Laplace's.
    """
    model, images, start = asked.model, asked.images, asked.proposal
    if not isinstance(start, CorrelatedMixture):
        source = asked.noise.at("proposal")
        start = modes(model, images, encode(model, images, source), source)
    return (
        yield from annealed(
            model,
            images,
            start,
            asked.noise.at("annealed"),
            temperatures=math.ceil(asked.particles / PER_TEMPERATURE),
            chains=CHAINS,
        )
    )


def _jackknife(order: int) -> Estimator:
    def debiased(asked: Asked) -> Stages[Estimate]:
        size, count = _groups(asked.particles, order)
        images, total = asked.images, size * count
        sums = WeightSums.empty(len(images), particles=total, like=images.values)
        by_block: list[Float[Tensor, "batch blocks"]] = []
        for block in blocks(
            asked.model,
            images,
            asked.noise,
            particles=total,
            proposal=asked.proposal,
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
    "importance": _importance,
    **{name: _jackknife(order) for name, order in ORDERS.items()},
    "adaptive": _adaptive,
    "annealed": _annealed,
}
