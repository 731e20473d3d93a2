r"""Annealed importance sampling with Hamiltonian transitions: slow, and close to log p(x_o).

A chain begins at $z_0 \sim q_j$, a Gaussian of the mixture $q = \frac1J \sum_j q_j$, and goes
through the distributions

$$ f_\beta(j, z) = \tfrac1J\, q_j(z) \left( \frac{p(x_o, z)}{q(z)} \right)^\beta, \qquad
   0 = \beta_0 < \beta_1 < \dots < \beta_T = 1, \qquad
   \log w = \sum_t (\beta_t - \beta_{t-1}) \log \frac{p(x_o, z_{t-1})}{q(z_{t-1})}, $$

where $z_t$ comes from $z_{t-1}$ by a transition that leaves $f_{\beta_t}(j, \cdot)$ as it is:
from $q_j$ to its share of the posterior, and summed over $j$ from $q$ to $p(x_o, z)$.
The mean of the weights is $p(x_o)$ without bias (Neal, "Annealed importance sampling", 2001),
its logarithm a lower bound in expectation that tightens with $T$, and the last states with their
weights are draws from the posterior. So are the states of further transitions, which leave
$p(z \mid x_o)$ as it is and the weights with it.

As many chains begin from each Gaussian: one that stays at one of several modes then has the weight
of its mode, and all together that of all modes.
Transitions are Hamiltonian (Neal, "MCMC using Hamiltonian dynamics", 2011) in the coordinates
where the chain's own Gaussian is $N(0, I)$; their step sizes are drawn beforehand, so that nothing
is tuned on the chains that are counted.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.latent import LatentVariableModel, gradients
from model.masks import Incomplete
from model.noise import Source
from model.proposal import CorrelatedMixture, Latents, PerParticle, StandardNormal
from model.stages import Stages

__all__ = ["LEAPFROGS", "Chains", "annealed"]

LEAPFROGS = 4
STEP_SIZES = (0.2, 0.7)
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
) -> Stages[Chains]:
    """Chains through so many temperatures and further transitions; pauses after each.

    `start` is a mixture over standard latents.

    Raises:
        ValueError: There are not as many chains for each of its Gaussians.
    """
    batch, components, size = start.mean.shape
    if chains % components:
        raise ValueError(f"Expected a multiple of {components} chains; got {chains}.")
    path = _Path.of(model, images, start, chains)
    at = path.point(noise.at("start").normal(batch, chains, size, like=start.mean))
    log_w = torch.zeros_like(at.log_ratio)
    accepted = torch.zeros_like(log_w)
    ladder = torch.linspace(-LADDER, LADDER, temperatures + 1).sigmoid().tolist()
    betas = [(rung - ladder[0]) / (ladder[-1] - ladder[0]) for rung in ladder]
    states: list[Latents] = []
    for index in range(temperatures + further):
        if index < temperatures:
            rise = betas[index + 1] - betas[index]
            log_w = log_w + rise * at.log_ratio
        beta = betas[min(index + 1, temperatures)]
        at, moved = path.transition(at, beta, noise.at("transition", index))
        accepted = accepted + moved
        states.append(at.standard)
        yield
    last = torch.stack([model.prior.from_standard(z) for z in states[temperatures - 1 :]], 1)
    return Chains(last, log_w, (accepted / len(states)).mean(-1))


@dataclass(frozen=True)
class _Point:
    """Where chains are, in coordinates u where the Gaussian that each began at is N(0, I)."""

    u: Latents
    standard: Latents
    log_ratio: PerParticle
    """The logarithm of p(x_o, z) / q(z)."""
    rise: Latents
    """Its gradient in u."""

    def height(self, beta: float) -> PerParticle:
        """The logarithm of f_β(j, z) but for a constant; that of q_j(z) is -|u|²/2."""
        return beta * self.log_ratio - 0.5 * self.u.square().sum(-1)

    def slope(self, beta: float) -> Latents:
        """Its gradient."""
        return beta * self.rise - self.u

    def where(self, moves: Bool[Tensor, "batch chains"], other: "_Point") -> "_Point":
        """The other point of those chains that move."""
        parts = {
            f.name: torch.where(
                moves if f.name.startswith("log") else moves[..., None],
                getattr(other, f.name),
                getattr(self, f.name),
            )
            for f in fields(self)
        }
        return _Point(**parts)


@dataclass(frozen=True)
class _Path:
    """The distributions from the mixture that chains begin at to the posterior."""

    model: LatentVariableModel
    images: Incomplete
    start: CorrelatedMixture
    inverse: Float[Tensor, "batch components latent latent"]
    """Of the factors of the start's Gaussians."""
    mean: Latents
    factor: Float[Tensor, "batch chains latent latent"]
    """Of the Gaussian that each chain is of."""

    @classmethod
    def of(
        cls,
        model: LatentVariableModel,
        images: Incomplete,
        start: CorrelatedMixture,
        chains: int,
    ) -> "_Path":
        identity = torch.eye(start.mean.shape[-1]).to(start.mean)
        inverse = torch.linalg.solve_triangular(start.factor, identity, upper=False)
        own = torch.arange(chains, device=identity.device) % start.mean.shape[1]
        mean, factor = start.mean[:, own], start.factor[:, own]
        with torch.inference_mode(mode=False):
            return cls(model, images.copy(), start, inverse, mean, factor)

    def point(self, u: Latents) -> _Point:
        standard = self.mean + (self.factor @ u[..., None])[..., 0]
        log_start, start_slope = self._start(standard)
        log_joint, joint_slope = self._joint(standard)
        rise = ((joint_slope - start_slope)[..., None, :] @ self.factor)[..., 0, :]
        return _Point(u, standard, log_joint - log_start, rise)

    def _start(self, standard: Latents) -> tuple[PerParticle, Latents]:
        """The logarithm of q(z) and its gradient in z."""
        away = standard[:, None] - self.start.mean[:, :, None]
        white = away @ self.inverse.mT
        scale = self.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
        each = scale - 0.5 * white.square().sum(-1)
        constant = math.log(each.shape[1]) + 0.5 * math.log(2 * math.pi) * standard.shape[-1]
        shares = each.softmax(1)[..., None]
        return each.logsumexp(1) - constant, -(shares * (white @ self.inverse)).sum(1)

    def _joint(self, standard: Latents) -> tuple[PerParticle, Latents]:
        """The logarithm of p(x_o, z), of z as of numbers from N(0, I), and its gradient in z."""
        with gradients():
            leaf = standard.clone().requires_grad_()
            decoded = self.model.decode(self.model.prior.from_standard(leaf))
            with torch.no_grad():
                density = self.model.likelihood.log_density(decoded, self.images)
                rise = self.model.likelihood.slope(decoded, self.images)
            (slope,) = torch.autograd.grad(decoded, [leaf], [rise])
        normal = StandardNormal(standard.shape[-1])
        return density + normal.log_density(standard), slope - standard

    def transition(self, at: _Point, beta: float, noise: Source) -> tuple[_Point, PerParticle]:
        """The next points, and where there was a move; those before where there was none."""
        u = at.u
        p = noise.at("momentum").normal(*u.shape, like=u)
        between = noise.at("step").uniform(*u.shape[:2], 1, like=u)
        size = STEP_SIZES[0] + (STEP_SIZES[1] - STEP_SIZES[0]) * between
        energy, there = at.height(beta) - 0.5 * p.square().sum(-1), at
        for _ in range(LEAPFROGS):
            p = p + 0.5 * size * there.slope(beta)
            there = self.point(there.u + size * p)
            p = p + 0.5 * size * there.slope(beta)
        gain = there.height(beta) - 0.5 * p.square().sum(-1) - energy
        chance = noise.at("accept").uniform(*u.shape[:2], like=u)
        moves = chance.log() < gain
        return at.where(moves, there), moves.to(u)
