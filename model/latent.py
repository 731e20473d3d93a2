r"""The latent-variable model, its proposal, and the particles that it draws.

$$ p(x, z) = p(z)\, p(x \mid z; \theta), \qquad
   p(x \mid z; \theta) = \prod_d p(x_d \mid z; \theta), \qquad
   \log p(x_o, z) = \log p(z) + \sum_{d \in o} \log p(x_d \mid z; \theta). $$

The pixels are independent given $z$, so that any of them may be missing.
The proposal of an image with holes is a mixture over $J$ ways to fill them,

$$ q(z) = \tfrac1J \sum_j q(z \mid \breve x_j; \phi), $$

whose density is the denominator of every particle whichever component drew it
(the balance heuristic of Veach and Guibas, 1995): with $J = 1$ it is the proposal of the slides.
An encoder gives the components, so a network with several stochastic layers or another family
is another `Proposal`; nobody outside this module assumes one Gaussian layer.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.masks import Incomplete
from model.networks import DECODERS, ENCODERS, ImageShape
from model.noise import Noise, Source
from model.weights import resample

__all__ = [
    "Architecture",
    "Bernoulli",
    "GaussianMixture",
    "LatentVariableModel",
    "Particles",
    "Proposal",
    "StandardNormal",
]

Latents = Float[Tensor, "batch particles latent"]
PerParticle = Float[Tensor, "batch particles"]
Pixels = Float[Tensor, "batch particles channels height width"]


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
        keys = noise.at("component").uniform(
            batch, -(-particles // components), components, like=self.mean
        )
        order = keys.argsort(-1).flatten(1)[:, :particles, None].expand(-1, -1, latent)
        return self.mean.gather(1, order) + self.log_std.gather(1, order).exp() * normals

    def log_density(self, latents: Latents) -> PerParticle:
        """The log-density of the whole mixture."""
        standard = (latents[:, :, None] - self.mean[:, None]) * (-self.log_std[:, None]).exp()
        exponent = -0.5 * standard.square().sum(-1)
        constant = self.log_std.sum(-1) + 0.5 * math.log(2 * math.pi) * latents.shape[-1]
        return (exponent - constant[:, None]).logsumexp(-1) - math.log(self.mean.shape[1])

    def divergence(self) -> Float[Tensor, " batch"]:
        """KL(q ‖ N(0, I)) of a single Gaussian."""
        if self.mean.shape[1] != 1:
            raise ValueError(
                "Expected a proposal of one Gaussian for the analytic divergence; "
                f"got a mixture of {self.mean.shape[1]}."
            )
        variance = (2 * self.log_std).exp()
        terms = self.mean.square() + variance - 1 - 2 * self.log_std
        return 0.5 * terms.sum((1, 2))

    def detach(self) -> "GaussianMixture":
        """The mixture with its parameters as constants."""
        return GaussianMixture(self.mean.detach(), self.log_std.detach())


@dataclass(frozen=True)
class StandardNormal:
    """The prior N(0, I)."""

    latent: int

    def draw(self, count: int, noise: Noise, *, like: Tensor) -> Float[Tensor, "batch latent"]:
        """Independent latents from the prior."""
        return noise.at("prior").normal(count, self.latent, like=like)

    def log_density(self, latents: Latents) -> PerParticle:
        """The logarithm of p(z)."""
        return -0.5 * (latents.square().sum(-1) + math.log(2 * math.pi) * self.latent)


@dataclass(frozen=True)
class Bernoulli:
    """Binary pixels, whose parameters are logits."""

    def log_density(self, logits: Pixels, images: Incomplete) -> tuple[PerParticle, PerParticle]:
        """Both log p(x_o | z) and E log p(x_m | z) under p(x_m | z) itself, without gradient."""
        observed = images.observed.flatten(1).to(logits)
        seen = images.values.flatten(1) * observed
        return _BernoulliLogDensity.apply(logits.flatten(2), seen, observed)  # pyright: ignore[reportReturnType]

    def log_density_of(
        self, logits: Pixels, values: Float[Tensor, "batch ..."], where: Bool[Tensor, "batch ..."]
    ) -> PerParticle:
        """The log-probability of some pixels of known values."""
        return self.log_density(logits, Incomplete.hide(values, where))[0]

    def mean(self, logits: Pixels) -> Pixels:
        """E[x | z]."""
        return logits.sigmoid()

    def mean_square(self, logits: Pixels) -> Pixels:
        """E[x² | z]."""
        return logits.sigmoid()

    def sample(
        self,
        logits: Float[Tensor, "*batch channels height width"],
        uniforms: Float[Tensor, "*batch channels height width"],
    ) -> Float[Tensor, "*batch channels height width"]:
        """Pixels x ~ p(x | z), from numbers that are uniform on [0, 1)."""
        return (uniforms < logits.sigmoid()).to(logits)


class _BernoulliLogDensity(torch.autograd.Function):
    """⟨x_o, l⟩ − Σ_o softplus(l) and Σ_m (σ(l)·l − softplus(l)), without a copy of x a particle.

    One sigmoid serves the value of the missing part and the gradient of the observed part.
    """

    @staticmethod
    def forward(ctx, logits, seen, observed):  # noqa: ANN001, ANN205  # pyright: ignore[reportMissingParameterType]
        softplus = torch.nn.functional.softplus(logits)
        mean = logits.sigmoid()
        total = softplus.sum(-1)
        observed_softplus = torch.bmm(softplus, observed[..., None])[..., 0]
        density = torch.bmm(logits, seen[..., None])[..., 0] - observed_softplus
        negative_entropy = torch.bmm(mean * logits, (1 - observed)[..., None])[..., 0]
        expected = negative_entropy - (total - observed_softplus)
        ctx.save_for_backward(mean, seen, observed)
        ctx.mark_non_differentiable(expected)
        return density, expected

    @staticmethod
    def backward(ctx, gradient, _expected):  # noqa: ANN001, ANN205  # pyright: ignore[reportMissingParameterType, reportIncompatibleMethodOverride]
        mean, seen, observed = ctx.saved_tensors
        slope = torch.addcmul(seen[:, None], mean, observed[:, None], value=-1)
        return slope.mul_(gradient[..., None]), None, None


LIKELIHOODS = {"bernoulli": Bernoulli}


@dataclass(frozen=True)
class Particles:
    """Latents with every log-density that an objective or an estimator needs of them."""

    latents: Latents
    parameters: Pixels
    """What the decoder made of the latents."""
    log_likelihood: PerParticle
    """log p(x_o | z)."""
    expected_log_missing: PerParticle
    """E log p(x_m | z) under p(x_m | z), without gradient."""
    log_prior: PerParticle
    proposal: Proposal

    @property
    def log_joint(self) -> PerParticle:
        """The logarithm of p(x_o, z)."""
        return self.log_likelihood + self.log_prior

    @property
    def log_weights(self) -> PerParticle:
        """The logarithm of w = p(x_o, z) / q(z)."""
        return self.log_joint - self.proposal.log_density(self.latents)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is rebuilt from: names in the tables of networks and their sizes."""

    image_shape: ImageShape = (1, 28, 28)
    latent: int = 40
    encoder: str = "mlp"
    decoder: str = "mlp"
    hidden: tuple[int, ...] = (300, 300)
    likelihood: str = "bernoulli"

    def build(self, noise: Noise) -> "LatentVariableModel":
        """A model with fresh weights."""
        sizes = {
            "image_shape": self.image_shape,
            "latent": self.latent,
            "hidden": self.hidden,
        }
        return LatentVariableModel(
            encoder=ENCODERS[self.encoder](**sizes, generator=noise.at("encoder").generator()),
            decoder=DECODERS[self.decoder](**sizes, generator=noise.at("decoder").generator()),
            prior=StandardNormal(self.latent),
            likelihood=LIKELIHOODS[self.likelihood](),
            architecture=self,
        )


class LatentVariableModel(nn.Module):
    """A prior, a decoder with its likelihood, and an encoder that proposes latents."""

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: StandardNormal,
        likelihood: Bernoulli,
        architecture: Architecture,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood
        self.architecture = architecture

    def encode(
        self, fillings: Float[Tensor, "batch components channels height width"]
    ) -> GaussianMixture:
        """The mixture of q(z | x̆) over several fillings of each image's holes."""
        return GaussianMixture(*self.encoder(fillings))

    def zero_filled(self, images: Incomplete) -> GaussianMixture:
        """q(z | (x_o, 0)), the proposal of missIWAE (Mattei and Frellsen, 2019)."""
        return self.encode(images.values[:, None])

    def two_pass(self, images: Incomplete, noise: Source, *, imputations: int) -> GaussianMixture:
        """q(z | (x_o, x̆_m)) with x̆_m ~ p(x_m | z̆), z̆ ~ q(z | (x_o, 0)): that of miss-IWEM.

        With several imputations it is the mixture over them.
        """
        with torch.no_grad():
            latents = self.zero_filled(images).draw(imputations, noise.at("first"))
            fillings = self.impute(images, latents, noise.at("filling"))
        return self.encode(fillings)

    def adapted(
        self, images: Incomplete, noise: Source, *, imputations: int = 64, rounds: int = 6
    ) -> GaussianMixture:
        """The mixture over imputations that have been moved towards p(x_m | x_o).

        In each round a particle of every component is weighted, and the holes are filled anew
        from particles resampled by the fifth roots of the weights, which keeps the components
        from falling onto one. The idea is that of latent-adaptive importance resampling (Simkus
        and Gutmann, "Conditional sampling of variational autoencoders via iterated approximate
        ancestral sampling", 2023). Particles of the last mixture alone are used, so that their
        weights estimate p(x_o) without bias. Where nothing was observed it is the prior.
        """
        proposal = self.two_pass(images, noise, imputations=imputations)
        for index in range(rounds):
            source = noise.at("round", index)
            latents = proposal.draw(imputations, source)
            log_w = self.particles(images, proposal, latents).log_weights
            uniforms = source.at("resample").uniform(*log_w.shape, like=log_w)
            picked = resample(log_w / 5, uniforms)[..., None].expand_as(latents)
            fillings = self.impute(images, latents.gather(1, picked), source.at("filling"))
            proposal = self.encode(fillings)
        blank = ~images.observed.flatten(1).any(1)[:, None, None]
        return GaussianMixture(
            proposal.mean.masked_fill(blank, 0.0), proposal.log_std.masked_fill(blank, 0.0)
        )

    def impute(self, images: Incomplete, latents: Latents, noise: Source) -> Pixels:
        """The images with x_m ~ p(x_m | z) for each of the latents."""
        logits = self.decoder(latents)
        sample = self.likelihood.sample(logits, noise.uniform(*logits.shape, like=logits))
        return torch.where(images.observed[:, None], images.values[:, None], sample)

    def particles(self, images: Incomplete, proposal: Proposal, latents: Latents) -> Particles:
        """The log-densities of these latents, which the proposal drew."""
        logits = self.decoder(latents)
        density, expected = self.likelihood.log_density(logits, images)
        log_prior = self.prior.log_density(latents)
        return Particles(latents, logits, density, expected, log_prior, proposal)

    def sample(self, count: int, noise: Noise) -> Float[Tensor, "batch channels height width"]:
        """Images from the model itself."""
        latents = self.prior.draw(count, noise, like=next(self.parameters()))
        logits = self.decoder(latents)
        uniforms = noise.at("pixels").uniform(*logits.shape, like=logits)
        return self.likelihood.sample(logits, uniforms)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
