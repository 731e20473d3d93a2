r"""Annealed importance sampling with Hamiltonian transitions: slow, and close to log p(x_o).

A chain begins at $z_0 \sim q$ and goes through the distributions

$$ f_\beta(z) = q(z)^{1-\beta}\, p(x_o, z)^\beta, \qquad
   0 = \beta_0 < \beta_1 < \dots < \beta_T = 1, \qquad
   \log w = \sum_t (\beta_t - \beta_{t-1}) \log \frac{p(x_o, z_{t-1})}{q(z_{t-1})}, $$

where $z_t$ comes from $z_{t-1}$ by a transition that leaves $f_{\beta_t}$ as it is.
The mean of the weights is $p(x_o)$ without bias (Neal, "Annealed importance sampling", 2001),
its logarithm a lower bound in expectation that tightens with $T$, and the last states with their
weights are draws from the posterior. So are the states of further transitions, which leave
$p(z \mid x_o)$ as it is and the weights with it.

$q$ is a whole mixture of Gaussians, from each of which as many chains begin: a chain that stays at
one of several modes then has the weight of its mode, and all together that of all modes.
Transitions are Hamiltonian (Neal, "MCMC using Hamiltonian dynamics", 2011) in the coordinates
where the chain's own Gaussian is $N(0, I)$; their step sizes are drawn beforehand, so that nothing
is tuned on the chains that are counted.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.latent import LatentVariableModel, gradients
from model.masks import Incomplete
from model.noise import Source
from model.proposal import CorrelatedMixture, Latents, PerParticle

__all__ = ["LEAPFROGS", "Chains", "annealed"]

LEAPFROGS = 6
STEP_SIZES = (0.1, 0.4)
"""In standard deviations of where a chain begins; each transition's is uniform between them."""
LADDER = 4.0
"""The temperatures are those of a logistic function from minus to plus this (Wu et al., "On the
quantitative analysis of decoder-based generative models", 2017)."""


@dataclass(frozen=True)
class Chains:
    """Where the chains came to, and what each counts."""

    latents: Float[Tensor, "batch states chains latent"]
    """The states after the last temperature, and those that were asked for after it."""
    log_weights: PerParticle
    """Of the chains, each for all of its states; their mean estimates p(x_o)."""
    acceptance: Float[Tensor, " batch"]
    """The part of an image's transitions that were accepted."""


def annealed(
    model: LatentVariableModel,
    images: Incomplete,
    start: CorrelatedMixture,
    noise: Source,
    *,
    temperatures: int,
    chains: int,
    further: int = 0,
) -> Generator[None, None, Chains]:
    """Chains through so many temperatures and further transitions; pauses after each.

    `start` is a mixture over standard latents.

    Raises:
        ValueError: There are not as many chains for each of its Gaussians.
    """
    batch, components, size = start.mean.shape
    if chains % components:
        raise ValueError(f"Expected a multiple of {components} chains; got {chains}.")
    path = _Path.of(model, images, start, chains)
    u = noise.at("start").normal(batch, chains, size, like=start.mean)
    log_w = torch.zeros_like(u[..., 0])
    accepted = torch.zeros_like(log_w)
    ladder = torch.linspace(-LADDER, LADDER, temperatures + 1).sigmoid().tolist()
    betas = [(rung - ladder[0]) / (ladder[-1] - ladder[0]) for rung in ladder]
    states: list[Latents] = []
    for index in range(temperatures + further):
        if index < temperatures:
            log_w = log_w + (betas[index + 1] - betas[index]) * path.log_ratio(u)
        beta = betas[min(index + 1, temperatures)]
        u, moved = path.transition(u, beta, noise.at("transition", index))
        accepted = accepted + moved
        states.append(u)
        yield
    last = torch.stack([path.latents(u) for u in states[temperatures - 1 :]], 1)
    return Chains(last, log_w, (accepted / len(states)).mean(-1))


@dataclass(frozen=True)
class _Path:
    """The distributions of chains, in coordinates where the first is N(0, I)."""

    model: LatentVariableModel
    images: Incomplete
    start: CorrelatedMixture
    inverse: Float[Tensor, "batch components latent latent"]
    """Of the factors of the start's Gaussians."""
    own: Int[Tensor, " chains"]
    """Of which of them each chain is."""

    @classmethod
    def of(
        cls,
        model: LatentVariableModel,
        images: Incomplete,
        start: CorrelatedMixture,
        chains: int,
    ) -> "_Path":
        with gradients():
            start = CorrelatedMixture(start.mean.clone(), start.factor.clone())
            identity = torch.eye(start.mean.shape[-1]).to(start.mean)
            inverse = torch.linalg.solve_triangular(start.factor, identity, upper=False)
            own = torch.arange(chains, device=identity.device) % start.mean.shape[1]
            return cls(model, images.copy(), start, inverse, own)

    def standard(self, u: Latents) -> Latents:
        return (
            self.start.mean[:, self.own] + (self.start.factor[:, self.own] @ u[..., None])[..., 0]
        )

    def latents(self, u: Latents) -> Latents:
        return self.model.prior.from_standard(self.standard(u))

    def log_start(self, standard: Latents) -> PerParticle:
        """The logarithm of q(z)."""
        away = standard[:, None] - self.start.mean[:, :, None]
        squares = (away @ self.inverse.mT).square().sum(-1)
        scale = self.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
        each = scale - 0.5 * squares - 0.5 * standard.shape[-1] * math.log(2 * math.pi)
        return each.logsumexp(1) - math.log(each.shape[1])

    def log_ratio(self, u: Latents) -> PerParticle:
        """The logarithm of p(x_o, z) / q(z)."""
        standard = self.standard(u)
        joint = self.model.standard_log_joint(self.images, standard)
        return joint - self.log_start(standard)

    def transition(self, u: Latents, beta: float, noise: Source) -> tuple[Latents, PerParticle]:
        """The next states, and where there was a move; the states before where there was none."""
        p = noise.at("momentum").normal(*u.shape, like=u)
        between = noise.at("step").uniform(*u.shape[:2], 1, like=u)
        size = STEP_SIZES[0] + (STEP_SIZES[1] - STEP_SIZES[0]) * between
        height, slope = self._slope(u, beta)
        energy, at = height - 0.5 * p.square().sum(-1), u
        for _ in range(LEAPFROGS):
            p = p + 0.5 * size * slope
            at = at + size * p
            height, slope = self._slope(at, beta)
            p = p + 0.5 * size * slope
        gain = height - 0.5 * p.square().sum(-1) - energy
        chance = noise.at("accept").uniform(*u.shape[:2], like=u)
        moves = chance.log() < gain
        return torch.where(moves[..., None], at, u), moves.to(u)

    def _slope(self, u: Latents, beta: float) -> tuple[PerParticle, Latents]:
        """The logarithm of f_β but for a constant, and its gradient."""
        with gradients():
            leaf = u.clone().requires_grad_()
            standard = self.standard(leaf)
            start = self.log_start(standard)
            joint = self.model.standard_log_joint(self.images, standard)
            height = (1 - beta) * start + beta * joint
            (slope,) = torch.autograd.grad(height.sum(), [leaf])
        return height.detach(), slope
