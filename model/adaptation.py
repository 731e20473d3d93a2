r"""Adaptive multiple importance sampling: a proposal that learns from its own weights.

In round $t$ particles are drawn from $q_t$, and all particles so far are weighted against all
proposals so far by the balance heuristic,

$$ w_i = \frac{p(x_o, z_i)}{\tfrac1t \sum_{s \le t} q_s(z_i)}, $$

of which the next Gaussian takes mean and covariance (Cornuet et al., "Adaptive multiple importance
sampling", 2012). Among few particles one weight may be almost all: the weights are raised to the
power at which enough of them count, and the covariance is mixed with that of the particles.
Every $q_t$ keeps a share of the prior, so that no weight can be large where the prior is not
small (Hesterberg, "Weighted average importance sampling and defensive mixture distributions",
1995), and one of where it began. What is estimated is estimated with fresh particles of the last,
so that nothing that was learned from is counted.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Source
from model.proposal import (
    Blend,
    CorrelatedMixture,
    Latents,
    PerParticle,
    PriorProposal,
    Proposal,
    Standardised,
)
from model.stages import Stages
from model.weights import effective_sample_size

__all__ = ["DEFENSIVE", "PER_ROUND", "ROUNDS", "adaptive"]

ROUNDS = 4
PER_ROUND = 256
DEFENSIVE, BEGINNING = 0.05, 0.25
"""Shares of the prior, and of the proposal from which the rounds began."""
ENOUGH = 2.0
"""Particles that must count for each latent before a covariance is made of them."""
SHRINKAGE = 0.2
"""The part of a covariance that is the diagonal of itself."""
BISECTIONS = 12


def adaptive(
    model: LatentVariableModel, images: Incomplete, proposal: Proposal, noise: Source
) -> Stages[Proposal]:
    """The proposal that a few rounds make of this one; pauses after each."""
    prior = PriorProposal(model.prior, images.values)
    rounds: list[Proposal] = [Blend([prior, proposal], [DEFENSIVE, 1 - DEFENSIVE])]
    latents: list[Latents] = []
    log_joint: list[PerParticle] = []
    for index in range(ROUNDS):
        drawn = rounds[-1].draw(PER_ROUND, noise.at("round", index))
        particles = model.particles(images, rounds[-1], drawn, keep=False)
        latents.append(drawn)
        log_joint.append(particles.log_joint)
        z = torch.cat(latents, 1)
        balance = Blend(rounds, [1 / len(rounds)] * len(rounds))
        log_w = torch.cat(log_joint, 1) - balance.log_density(z)
        learned = Standardised(_moments(model.prior.to_standard(z), log_w), model.prior)
        shares = [DEFENSIVE, BEGINNING, 1 - DEFENSIVE - BEGINNING]
        rounds.append(Blend([prior, proposal, learned], shares))
        yield
    return rounds[-1]


def _moments(z: Latents, log_weights: PerParticle) -> CorrelatedMixture:
    """A Gaussian with the particles' weighted mean and covariance."""
    w = _tempered(log_weights.double(), ENOUGH * z.shape[-1])[..., None]
    standard = z.double()
    mean = (w * standard).sum(1, keepdim=True)
    away = standard - mean
    covariance = away.mT @ (w * away)
    own = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=SMALLEST).diag_embed()
    mixed = (1 - SHRINKAGE) * covariance + SHRINKAGE * own
    factor = torch.linalg.cholesky(mixed)[:, None]
    return CorrelatedMixture(mean.to(z), factor.to(z))


SMALLEST = 1e-6


def _tempered(
    log_weights: Float[Tensor, "batch particles"], enough: float
) -> Float[Tensor, "batch particles"]:
    """The normalised weights to the highest power, at most one, at which so many count."""
    low = torch.zeros_like(log_weights[:, :1])
    high = torch.ones_like(low)
    power = high
    for _ in range(BISECTIONS):
        good = effective_sample_size(power * log_weights)[:, None] >= enough
        low, high = torch.where(good, power, low), torch.where(good, high, power)
        power = torch.where(high == low, high, (low + high) / 2)
    return (low * log_weights).softmax(-1)
