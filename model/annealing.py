r"""Annealed importance sampling with Hamiltonian transitions: slow, and close to log p(x_o).

A chain begins at $z_0 \sim q$ and goes through the distributions

$$ f_\beta(z) = q(z)^{1-\beta}\, p(x_o, z)^\beta, \qquad
   0 = \beta_0 < \beta_1 < \dots < \beta_T = 1, \qquad
   \log w = \sum_t (\beta_t - \beta_{t-1}) \log \frac{p(x_o, z_{t-1})}{q(z_{t-1})}, $$

where $z_t$ comes from $z_{t-1}$ by a transition that leaves $f_{\beta_t}$ as it is.
The mean of the weights is $p(x_o)$ without bias (Neal, "Annealed importance sampling", 2001),
its logarithm a lower bound in expectation that tightens with $T$, and the last states with their
weights are draws from the posterior.

Transitions are Hamiltonian (Neal, "MCMC using Hamiltonian dynamics", 2011) in the coordinates
where $q$ is $N(0, I)$; their step sizes are drawn beforehand, so that nothing is tuned on the
chains that are counted. $q$ is a Gaussian of Laplace's mixture, each chain's own.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel, gradients
from model.masks import Incomplete
from model.noise import Source
from model.proposal import CorrelatedMixture, Latents, PerParticle, StandardNormal

__all__ = ["LEAPFROGS", "Chains", "annealed"]

LEAPFROGS = 6
STEP_SIZES = (0.1, 0.4)
"""In standard deviations of where a chain begins; each transition's is uniform between them."""
LADDER = 4.0
"""The temperatures are those of a logistic function from minus to plus this (Wu et al., "On the
quantitative analysis of decoder-based generative models", 2017)."""


@dataclass(frozen=True)
class Chains:
    """Where the chains ended, and what each counts."""

    latents: Latents
    log_weights: PerParticle
    """The mean of the weights estimates p(x_o)."""
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
) -> Generator[None, None, Chains]:
    """Chains through so many temperatures; pauses after each.

    `start` is a mixture over standard latents, of whose Gaussians each has as many chains or
    one fewer.
    """
    path = _Path.of(model, images, start, chains)
    batch, _, size = path.mean.shape
    u = noise.at("start").normal(batch, chains, size, like=path.mean)
    log_w = torch.zeros_like(u[..., 0])
    accepted = torch.zeros_like(log_w)
    ladder = torch.linspace(-LADDER, LADDER, temperatures + 1).sigmoid().tolist()
    betas = [(rung - ladder[0]) / (ladder[-1] - ladder[0]) for rung in ladder]
    for index in range(temperatures):
        log_w = log_w + (betas[index + 1] - betas[index]) * path.log_ratio(u)
        u, moved = path.transition(u, betas[index + 1], noise.at("transition", index))
        accepted = accepted + moved
        yield
    return Chains(path.latents(u), log_w, (accepted / temperatures).mean(-1))


@dataclass(frozen=True)
class _Path:
    """The distributions of chains, in coordinates where the first is N(0, I)."""

    model: LatentVariableModel
    images: Incomplete
    mean: Latents
    factor: Float[Tensor, "batch chains latent latent"]

    @classmethod
    def of(
        cls,
        model: LatentVariableModel,
        images: Incomplete,
        start: CorrelatedMixture,
        chains: int,
    ) -> "_Path":
        with gradients():
            at = torch.arange(chains, device=start.mean.device) % start.mean.shape[1]
            mean, factor = start.mean[:, at].clone(), start.factor[:, at].clone()
            return cls(model, images.copy(), mean, factor)

    def standard(self, u: Latents) -> Latents:
        return self.mean + (self.factor @ u[..., None])[..., 0]

    def latents(self, u: Latents) -> Latents:
        return self.model.prior.from_standard(self.standard(u))

    def log_ratio(self, u: Latents) -> PerParticle:
        """The logarithm of p(x_o, z) / q(z)."""
        scale = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_joint = self.model.standard_log_joint(self.images, self.standard(u))
        return log_joint + scale - StandardNormal(u.shape[-1]).log_density(u)

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
            height = beta * self.log_ratio(leaf) - 0.5 * leaf.square().sum(-1)
            (slope,) = torch.autograd.grad(height.sum(), [leaf])
        return height.detach(), slope
