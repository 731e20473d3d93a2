r"""Distributions of the latents: the prior $p(z)$ and the proposals $q(z)$.

A model of one stochastic layer has the prior $N(0, I)$ and Gaussian proposals.
One of two (Burda, Grosse and Salakhutdinov, 2016) has $z = (z_1, z_2)$, of which the decoder sees
the first,

$$ p(z) = p(z_2)\, p(z_1 \mid z_2; \theta), \qquad q(z) = q(z_1)\, q(z_2 \mid z_1; \phi). $$

The proposal of an image with holes is a mixture over $J$ ways to fill them,

$$ q(z_1) = \tfrac1J \sum_j q(z_1 \mid \breve x_j; \phi), $$

whose density is the denominator of every particle whichever component drew it
(the balance heuristic of Veach and Guibas, 1995): with $J = 1$ it is the proposal of the slides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from model.noise import Noise, Source

__all__ = [
    "Amortised",
    "Blend",
    "CorrelatedMixture",
    "GaussianMixture",
    "Latents",
    "Prior",
    "PriorProposal",
    "Proposal",
    "Stacked",
    "StackedPrior",
    "StandardNormal",
    "Standardised",
]

Latents = Float[Tensor, "batch particles latent"]
PerParticle = Float[Tensor, "batch particles"]
Standard = Float[Tensor, "*batch latent"]
Upper = Float[Tensor, "batch particles upper"]


@runtime_checkable
class Proposal(Protocol):
    """A distribution of z for each image of a batch, from which particles are drawn."""

    def draw(self, particles: int, noise: Source) -> Latents:
        """So many latents an image, differentiable in the distribution's parameters."""
        ...

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of q(z)."""
        ...

    def divergence(self) -> Float[Tensor, " batch"]:
        """The closed-form KL(q ‖ p) from the prior; ValueError where there is none."""
        ...

    def detach(self) -> "Proposal":
        """The same distribution, through whose parameters no gradient flows."""
        ...


@runtime_checkable
class Amortised(Proposal, Protocol):
    """A proposal that an encoder made, whose Gaussians may be moved."""

    @property
    def lower(self) -> "GaussianMixture":
        """The distribution of the latents that the decoder sees."""
        ...

    def above(self, lower: "GaussianMixture") -> "Amortised":
        """The same distribution but for that of the latents that the decoder sees."""
        ...


@dataclass(frozen=True)
class GaussianMixture:
    """An even mixture of Gaussians with diagonal covariances."""

    mean: Float[Tensor, "batch components latent"]
    log_std: Float[Tensor, "batch components latent"]

    def draw(self, particles: int, noise: Source) -> Latents:
        """Latents that use the components evenly, in an order drawn afresh.

        Each particle is by itself a draw from the mixture, so that any number of them may be
        used; together they vary less than independent ones.
        """
        batch, components, latent = self.mean.shape
        normals = noise.at("normal").normal(batch, particles, latent, like=self.mean)
        if components == 1:
            return self.mean + self.log_std.exp() * normals
        order = _evenly(components, particles, batch, noise.at("component"), like=self.mean)
        order = order[..., None].expand(-1, -1, latent)
        return self.mean.gather(1, order) + self.log_std.gather(1, order).exp() * normals

    def log_density(self, latents: Latents) -> PerParticle:
        """The log-density of the whole mixture."""
        if self.mean.shape[1] == 1:
            return _log_normal(latents, self.mean, self.log_std)
        # The square is multiplied out, so that it is a product of matrices and not a tensor of
        # particles times components times latents; in float64, where nothing cancels.
        z, mean, log_std = latents.double(), self.mean.double(), self.log_std.double()
        precision = (-2 * log_std).exp()
        weights = torch.cat([-0.5 * precision, mean * precision], -1)
        constant = (0.5 * mean.square() * precision + log_std).sum(-1)
        exponent = torch.cat([z.square(), z], -1) @ weights.transpose(1, 2) - constant[:, None]
        mixed = exponent.logsumexp(-1) - math.log(mean.shape[1])
        return (mixed - 0.5 * math.log(2 * math.pi) * z.shape[-1]).to(latents)

    def divergence(self) -> Float[Tensor, " batch"]:
        """KL(q ‖ N(0, I)) of a single Gaussian."""
        _one(self.mean)
        variance = (2 * self.log_std).exp()
        terms = self.mean.square() + variance - 1 - 2 * self.log_std
        return 0.5 * terms.sum((1, 2))

    def leaf(self) -> "GaussianMixture":
        """The mixture with its parameters as leaves, whose gradients may be asked for."""
        return GaussianMixture(
            self.mean.detach().requires_grad_(), self.log_std.detach().requires_grad_()
        )

    def copy(self) -> "GaussianMixture":
        """The mixture with its parameters as constants in memory of their own."""
        return GaussianMixture(self.mean.detach().clone(), self.log_std.detach().clone())

    @property
    def lower(self) -> "GaussianMixture":
        """Itself: there is one stochastic layer."""
        return self

    def above(self, lower: "GaussianMixture") -> "GaussianMixture":
        """The other mixture: there is nothing above it."""
        return lower

    def standard_where(self, rows: Bool[Tensor, " batch"]) -> "GaussianMixture":
        """The mixture, but N(0, I) for some images."""
        at = rows[:, None, None]
        return GaussianMixture(self.mean.masked_fill(at, 0.0), self.log_std.masked_fill(at, 0.0))

    def detach(self) -> "GaussianMixture":
        """The mixture with its parameters as constants."""
        return GaussianMixture(self.mean.detach(), self.log_std.detach())


@dataclass(frozen=True)
class CorrelatedMixture:
    """An even mixture of Gaussians with full covariances F·Fᵀ."""

    mean: Float[Tensor, "batch components latent"]
    factor: Float[Tensor, "batch components latent latent"]
    """The lower triangular F of each component."""

    @classmethod
    def of_precision(
        cls, mean: Latents, precision: Float[Tensor, "batch components latent latent"]
    ) -> "CorrelatedMixture":
        """Gaussians whose covariances are the inverses of these, taken in double precision."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision.double()))
        return cls(mean, torch.linalg.cholesky(inverse).to(mean))

    def draw(self, particles: int, noise: Source) -> Latents:
        """Latents that use the components evenly, in an order drawn afresh."""
        batch, components, latent = self.mean.shape
        normals = noise.at("normal").normal(batch, particles, latent, like=self.mean)
        order = _evenly(components, particles, batch, noise.at("component"), like=self.mean)
        picked = order[:, None, :, None].expand(-1, -1, -1, latent)
        # a product with every factor is less work than a copy of its factor for each particle
        of_each = self.mean[:, :, None] + normals[:, None] @ self.factor.mT
        return of_each.gather(1, picked)[:, 0]

    def log_density(self, latents: Latents) -> PerParticle:
        """The log-density of the whole mixture, computed in float64."""
        factor, away = self.factor.double(), latents.double()[:, None] - self.mean[:, :, None]
        standard = torch.linalg.solve_triangular(factor, away.mT, upper=False)
        scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        exponent = -0.5 * standard.square().sum(-2) - scale[..., None]
        constant = 0.5 * math.log(2 * math.pi) * latents.shape[-1]
        mixed = exponent.logsumexp(1) - math.log(self.mean.shape[1]) - constant
        return mixed.to(latents)

    def divergence(self) -> Float[Tensor, " batch"]:
        """KL(q ‖ N(0, I)) of a single Gaussian."""
        _one(self.mean)
        trace = self.mean.square().sum((1, 2)) + self.factor.square().sum((1, 2, 3))
        scale = self.factor.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        return 0.5 * (trace - self.mean.shape[-1]) - scale

    def detach(self) -> "CorrelatedMixture":
        """The mixture with its parameters as constants."""
        return CorrelatedMixture(self.mean.detach(), self.factor.detach())


@dataclass(frozen=True)
class Blend:
    """A mixture of distributions of whatever kind, each with its share."""

    parts: Sequence[Proposal]
    shares: Sequence[float]
    """They add up to one."""

    def draw(self, particles: int, noise: Source) -> Latents:
        """Latents of which each part gives its share, in an order drawn afresh.

        Each particle is by itself a draw from the mixture, as those of the other mixtures are.
        """
        drawn = torch.stack(
            [part.draw(particles, noise.at("part", i)) for i, part in enumerate(self.parts)], 2
        )
        first = noise.at("first").uniform(len(drawn), 1, like=drawn)
        keys = noise.at("order").uniform(len(drawn), particles, like=drawn)
        ends = torch.tensor(self.shares, dtype=torch.float64, device=drawn.device).cumsum(0)
        places = (first + torch.arange(particles, device=drawn.device)) / particles
        part = torch.searchsorted(ends, places.double(), right=True).clamp(max=len(self.parts) - 1)
        picked = part.gather(1, keys.argsort(-1))[:, :, None, None]
        return drawn.gather(2, picked.expand(-1, -1, 1, drawn.shape[-1]))[:, :, 0]

    def log_density(self, latents: Latents) -> PerParticle:
        """The log-density of the whole mixture."""
        each = torch.stack([part.log_density(latents) for part in self.parts])
        shares = torch.tensor(self.shares, dtype=torch.float64, device=each.device).log()
        return (each + shares[:, None, None]).logsumexp(0).to(each)

    def divergence(self) -> Float[Tensor, " batch"]:
        """There is none in closed form."""
        raise ValueError(
            "Expected a proposal of one Gaussian for the analytic divergence; got a blend."
        )

    def detach(self) -> "Blend":
        """The mixture with its parameters as constants."""
        return Blend([part.detach() for part in self.parts], self.shares)


@runtime_checkable
class Prior(Protocol):
    """A distribution of z."""

    @property
    def size(self) -> int:
        """How many latents there are, over all layers."""
        ...

    def draw(self, count: int, noise: Noise, *, like: Tensor) -> Float[Tensor, "batch latent"]:
        """Independent latents."""
        ...

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of p(z)."""
        ...

    def from_standard(self, standard: Standard) -> Standard:
        """Latents from independent N(0, 1) numbers, one to one."""
        ...

    def to_standard(self, latents: Standard) -> Standard:
        """The numbers that latents come from."""
        ...


@dataclass(frozen=True)
class StandardNormal:
    """The prior N(0, I)."""

    latent: int

    @property
    def size(self) -> int:
        """How many latents there are."""
        return self.latent

    def draw(self, count: int, noise: Noise, *, like: Tensor) -> Float[Tensor, "batch latent"]:
        """Independent latents from the prior."""
        return noise.at("prior").normal(count, self.latent, like=like)

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of p(z)."""
        return -0.5 * (latents.square().sum(-1) + math.log(2 * math.pi) * self.latent)

    def from_standard(self, standard: Standard) -> Standard:
        """The same numbers."""
        return standard

    def to_standard(self, latents: Standard) -> Standard:
        """The same numbers."""
        return latents


@dataclass(frozen=True)
class PriorProposal:
    """The prior of the latents, for so many images."""

    prior: Prior
    like: Float[Tensor, "batch ..."]
    """A tensor of as many images, and of the latents' kind."""

    def draw(self, particles: int, noise: Source) -> Latents:
        """Latents from the prior, whatever the images are."""
        size = self.prior.size
        return self.prior.from_standard(
            noise.at("normal").normal(len(self.like), particles, size, like=self.like)
        )

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of p(z)."""
        return self.prior.log_density(latents)

    def divergence(self) -> Float[Tensor, " batch"]:
        """Zero."""
        return self.like.new_zeros(len(self.like))

    def detach(self) -> "PriorProposal":
        """Itself: it has no parameters of its own."""
        return self


class StackedPrior(nn.Module):
    """p(z₂)·p(z₁ | z₂) with p(z₂) = N(0, I) and a network for the Gaussian below it."""

    def __init__(self, lower: int, upper: int, network: nn.Module) -> None:
        super().__init__()
        self.lower, self.upper, self.network = lower, StandardNormal(upper), network

    @property
    def size(self) -> int:
        """How many latents there are in both layers."""
        return self.lower + self.upper.size

    def draw(self, count: int, noise: Noise, *, like: Tensor) -> Float[Tensor, "batch latent"]:
        """Independent latents, the lower ones first."""
        z2 = self.upper.draw(count, noise.at("upper"), like=like)
        return self.from_standard(
            torch.cat([noise.at("lower").normal(count, self.lower, like=like), z2], -1)
        )

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of p(z₂)·p(z₁ | z₂)."""
        z1, z2 = latents[..., : self.lower], latents[..., self.lower :]
        return self.upper.log_density(z2) + _log_normal(z1, *self.network(z2))

    def from_standard(self, standard: Standard) -> Standard:
        """z₂ is its numbers, and z₁ is put where p(z₁ | z₂) has it."""
        z2 = standard[..., self.lower :]
        mean, log_std = self.network(z2)
        return torch.cat([mean + log_std.exp() * standard[..., : self.lower], z2], -1)

    def to_standard(self, latents: Standard) -> Standard:
        """The numbers that latents come from."""
        z1, z2 = latents[..., : self.lower], latents[..., self.lower :]
        mean, log_std = self.network(z2)
        return torch.cat([(z1 - mean) * (-log_std).exp(), z2], -1)


@dataclass(frozen=True)
class Standardised:
    """A mixture over the N(0, I) numbers that a prior makes latents of."""

    mixture: CorrelatedMixture
    prior: Prior

    def draw(self, particles: int, noise: Source) -> Latents:
        """What the prior makes of the mixture's draws."""
        return self.prior.from_standard(self.mixture.draw(particles, noise))

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of q(z): whatever stretches the latents stretches N(0, I) to p(z)."""
        standard = self.prior.to_standard(latents)
        normal = StandardNormal(standard.shape[-1]).log_density(standard)
        return self.mixture.log_density(standard) + self.prior.log_density(latents) - normal

    def divergence(self) -> Float[Tensor, " batch"]:
        """KL(q ‖ p), which is that of the mixture from N(0, I)."""
        return self.mixture.divergence()

    def detach(self) -> "Standardised":
        """The mixture's parameters as constants; those of the prior are θ."""
        return Standardised(self.mixture.detach(), self.prior)


@dataclass(frozen=True)
class Stacked:
    """q(z₁)·q(z₂ | z₁): a mixture of Gaussians and a network for the Gaussian above it."""

    lower: GaussianMixture
    network: nn.Module
    constant: bool = False
    """Whether the network's weights are held constant."""

    def draw(self, particles: int, noise: Source) -> Latents:
        """Latents of both layers, the lower ones first."""
        z1 = self.lower.draw(particles, noise)
        mean, log_std = self._above(z1)
        z2 = mean + log_std.exp() * noise.at("upper").normal(*mean.shape, like=mean)
        return torch.cat([z1, z2], -1)

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of q(z₁)·q(z₂ | z₁)."""
        size = self.lower.mean.shape[-1]
        z1, z2 = latents[..., :size], latents[..., size:]
        return self.lower.log_density(z1) + _log_normal(z2, *self._above(z1))

    def above(self, lower: GaussianMixture) -> "Stacked":
        """The same network above another mixture."""
        return Stacked(lower, self.network, self.constant)

    def standard_where(self, rows: Bool[Tensor, " batch"]) -> "Stacked":
        """The distribution, but with N(0, I) as the lower layer's for some images."""
        return self.above(self.lower.standard_where(rows))

    def divergence(self) -> Float[Tensor, " batch"]:
        """There is none in closed form."""
        raise ValueError(
            "Expected a proposal of one Gaussian for the analytic divergence; "
            "got one of two stochastic layers."
        )

    def detach(self) -> "Stacked":
        """The distribution with its parameters as constants; latents still carry gradient."""
        return Stacked(self.lower.detach(), self.network, constant=True)

    def _above(self, z1: Latents) -> tuple[Upper, Upper]:
        if not self.constant:
            return self.network(z1)
        weights = {name: p.detach() for name, p in self.network.named_parameters()}
        return functional_call(self.network, weights, (z1,))


def _one(mean: Float[Tensor, "batch components latent"]) -> None:
    if mean.shape[1] != 1:
        raise ValueError(
            "Expected a proposal of one Gaussian for the analytic divergence; "
            f"got a mixture of {mean.shape[1]}."
        )


def _evenly(
    components: int, particles: int, batch: int, noise: Source, *, like: Tensor
) -> Int[Tensor, "batch particles"]:
    """Which component each particle is drawn from: all as often, in a random order."""
    keys = noise.uniform(batch, -(-particles // components), components, like=like)
    return keys.argsort(-1).flatten(1)[:, :particles]


def _log_normal(z: Latents, mean: Tensor, log_std: Tensor) -> PerParticle:
    standard = (z - mean) * (-log_std).exp()
    constant = 0.5 * math.log(2 * math.pi) * z.shape[-1]
    return -0.5 * standard.square().sum(-1) - log_std.sum(-1) - constant
