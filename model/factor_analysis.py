r"""Factor analysis of images with holes: a linear model whose every answer is exact.

$$ z \sim N(0, I), \qquad x \mid z \sim N(W z + b, \Psi), \qquad \Psi \text{ diagonal}, $$

and with $\Psi = \sigma^2 I$ it is probabilistic principal component analysis (Tipping and Bishop,
1999). Given the observed pixels the latents are Gaussian for any mask,

$$ p(z \mid x_o) = N(m, S), \qquad S^{-1} = I + W_o^\top \Psi_o^{-1} W_o, \qquad
   m = S\, W_o^\top \Psi_o^{-1} (x_o - b_o), $$

so that the E-step of EM needs no complete image, and the M-step is a regression of each pixel on
the latents over the images where it was seen (Rubin and Thayer, 1982; Ghahramani and Hinton,
1996). The log-likelihood of the observed pixels never falls.
It is the oracle of every estimator: log p(x_o), E[x_m | x_o] and Cov[x_m | x_o] are closed forms.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from model.masks import Incomplete
from model.noise import Noise
from model.proposal import CorrelatedMixture

__all__ = ["FactorAnalysis", "fit"]

SMALLEST_VARIANCE = 1e-4
"""Of a pixel's noise: one that never changes would have none."""


@dataclass(frozen=True)
class FactorAnalysis:
    """The parameters of a model, in double precision where they are fitted."""

    loadings: Float[Tensor, "pixels latent"]
    offset: Float[Tensor, " pixels"]
    variance: Float[Tensor, " pixels"]
    """Of each pixel's noise, the diagonal of Ψ."""

    def posterior(self, images: Incomplete) -> CorrelatedMixture:
        """p(z | x_o), a Gaussian for each image; where nothing was observed it is the prior."""
        precision, projected = self._evidence(images)
        mean = torch.cholesky_solve(projected[..., None], torch.linalg.cholesky(precision))
        return CorrelatedMixture.of_precision(mean.mT, precision[:, None])

    def log_likelihood(self, images: Incomplete) -> Float[Tensor, " batch"]:
        """The exact log p(x_o), by the matrix determinant and inversion lemmas."""
        precision, projected = self._evidence(images)
        factor = torch.linalg.cholesky(precision)
        explained = torch.linalg.solve_triangular(factor, projected[..., None], upper=False)
        seen = images.observed.flatten(1)
        noise = torch.where(seen, (2 * math.pi * self.variance).log(), 0.0).sum(-1)
        misfit = (self._residual(images).square() / self.variance).sum(-1)
        determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (noise + determinant + misfit - explained.square().sum((1, 2)))

    def conditional(
        self, images: Incomplete
    ) -> tuple[Float[Tensor, "batch pixels"], Float[Tensor, "batch pixels pixels"]]:
        """E[x | x_o] and Cov[x | x_o]; an observed pixel is itself, and does not vary."""
        posterior, seen = self.posterior(images), images.observed.flatten(1)
        mean = posterior.mean[:, 0] @ self.loadings.T + self.offset
        spread = self.loadings @ posterior.factor[:, 0]
        covariance = spread @ spread.mT + self.variance.diag()
        both = ~seen[:, :, None] & ~seen[:, None]
        values = torch.where(seen, images.values.flatten(1).to(mean), mean)
        return values, torch.where(both, covariance, 0.0)

    def _residual(self, images: Incomplete) -> Float[Tensor, "batch pixels"]:
        """x_o − b_o, and zero where nothing was observed."""
        values = images.values.flatten(1).to(self.offset)
        return torch.where(images.observed.flatten(1), values - self.offset, 0.0)

    def _evidence(
        self, images: Incomplete
    ) -> tuple[Float[Tensor, "batch latent latent"], Float[Tensor, "batch latent"]]:
        """The precision of p(z | x_o), and that times its mean."""
        latent = self.loadings.shape[1]
        weights = torch.where(images.observed.flatten(1), 1 / self.variance, 0.0)
        squares = self.loadings[:, :, None] * self.loadings[:, None]
        precision = (weights @ squares.flatten(1)).unflatten(-1, (latent, latent))
        identity = torch.eye(latent, dtype=precision.dtype, device=precision.device)
        projected = (self._residual(images) / self.variance) @ self.loadings
        return identity + precision, projected


def fit(
    batches: Sequence[Incomplete] | Iterable[Incomplete],
    latent: int,
    *,
    iterations: int,
    isotropic: bool = False,
    tolerance: float = 0.0,
    noise: Noise,
    watch: Callable[[float], object] = float,
) -> tuple[FactorAnalysis, list[float]]:
    """The model after so many iterations of EM over the batches, which are gone over again each.

    Also gives the mean log p(x_o) of an image before every iteration and after the last; `watch`
    is told each as soon as it is known, and where it grows by less than the tolerance, in nats,
    the iterations end. With `isotropic` all pixels have the same noise: principal component
    analysis.

    Raises:
        ValueError: There are no images, or no pixel was observed in any.
    """
    model = _start(batches, latent, noise, isotropic=isotropic)
    history: list[float] = []
    for index in range(iterations + 1):
        sums = _Sums.of(model, batches)
        history.append(sums.log_likelihood / sums.images)
        watch(history[-1])
        still = len(history) > 1 and history[-1] - history[-2] < tolerance
        if still or index == iterations:
            break
        model = sums.best(model, isotropic=isotropic)
    return model, history


def _start(
    batches: Iterable[Incomplete], latent: int, noise: Noise, *, isotropic: bool
) -> FactorAnalysis:
    """Each pixel's mean and variance, or all pixels' one, where seen, and random loadings.

    It is of the family that EM stays in: from outside, the first M-step could lose likelihood.
    """
    count = total = squares = torch.zeros((), dtype=torch.float64)
    for images in batches:
        values, seen = images.values.flatten(1).double(), images.observed.flatten(1)
        count = count + seen.sum(0)
        total, squares = total + values.sum(0), squares + values.square().sum(0)
    if not count.any():
        raise ValueError("Expected images with observed pixels; got none.")
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=SMALLEST_VARIANCE)
    if isotropic:
        variance = ((count * variance).sum() / count.sum()).expand_as(variance)
    directions = noise.at("loadings").normal(len(mean), latent, like=mean)
    return FactorAnalysis((variance / latent).sqrt()[:, None] * directions, mean, variance)


@dataclass
class _Sums:
    """What the M-step needs of all images, with z̃ = (z, 1)."""

    images: int
    log_likelihood: float
    counts: Float[Tensor, " pixels"]
    squares: Float[Tensor, " pixels"]
    """Σ x², over the images where the pixel was seen."""
    crossed: Float[Tensor, "pixels latent_and_1"]
    """Σ x E[z̃]."""
    moments: Float[Tensor, "pixels latent_and_1 latent_and_1"]
    """Σ E[z̃ z̃ᵀ]."""

    @classmethod
    def of(cls, model: FactorAnalysis, batches: Iterable[Incomplete]) -> "_Sums":
        """The E-step."""
        pixels, size = model.loadings.shape[0], model.loadings.shape[1] + 1
        zeros = model.offset.new_zeros
        sums = cls(
            0, 0.0, zeros(pixels), zeros(pixels), zeros(pixels, size), zeros(pixels, size, size)
        )
        for images in batches:
            sums.add(model, images)
        return sums

    def add(self, model: FactorAnalysis, images: Incomplete) -> None:
        """Adds a batch."""
        values, seen = images.values.flatten(1).double(), images.observed.flatten(1).double()
        posterior = model.posterior(images)
        one = posterior.mean.new_ones(len(images), 1)
        z = torch.cat([posterior.mean[:, 0], one], -1)
        outer = z[:, :, None] * z[:, None]
        factor = posterior.factor[:, 0]
        outer[:, :-1, :-1] += factor @ factor.mT
        self.images += len(images)
        self.log_likelihood += model.log_likelihood(images).sum().item()
        self.counts += seen.sum(0)
        self.squares += values.square().sum(0)
        self.crossed += values.T @ z
        self.moments += (seen.T @ outer.flatten(1)).view_as(self.moments)

    def best(self, model: FactorAnalysis, *, isotropic: bool) -> FactorAnalysis:
        """The M-step; a pixel that was never seen stays as it is."""
        seen = self.counts > 0
        identity = torch.eye(self.moments.shape[-1], dtype=torch.float64)
        moments = torch.where(seen[:, None, None], self.moments, identity)
        weights = torch.linalg.solve(moments, self.crossed)
        misfit = self.squares - (weights * self.crossed).sum(-1)
        variance = misfit / self.counts.clamp(min=1)
        variance = torch.where(seen, variance, model.variance)
        if isotropic:
            variance = (misfit[seen].sum() / self.counts.sum()).expand_as(variance)
        return FactorAnalysis(
            torch.where(seen[:, None], weights[:, :-1], model.loadings),
            torch.where(seen, weights[:, -1], model.offset),
            variance.clamp(min=SMALLEST_VARIANCE),
        )
