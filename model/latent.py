r"""The latent-variable model and the particles that its proposals draw.

$$ p(x, z) = p(z; \theta)\, p(x \mid z; \theta), \qquad
   \log p(x_o, z) = \log p(z) + \sum_{d \in o} \log p(x_d \mid z; \theta). $$

The pixels are independent given $z$, so that any of them may be missing.
An encoder makes the proposal of an image whose holes are filled, in one of three ways:
with zeros, with what the model itself would put there after a first look, or with imputations
that have been moved towards $p(x_m \mid x_o)$.
Nobody outside `Architecture.build` and `encode` knows how many stochastic layers there are.
"""

import math
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.factor_analysis import FactorAnalysis
from model.masks import Incomplete
from model.networks import DECODERS, ENCODERS, Gaussian, ImageShape, LinearDecoder, MlpDecoder
from model.noise import Noise, Source
from model.pixels import (
    LIKELIHOODS,
    Bernoulli,
    GaussianPixels,
    Likelihood,
    PerParticle,
    Pixels,
    bernoulli_sums,
)
from model.proposal import (
    CorrelatedMixture,
    GaussianMixture,
    Latents,
    Prior,
    Proposal,
    Stacked,
    StackedPrior,
    StandardNormal,
)
from model.weights import resample

__all__ = [
    "CACHED_ROWS",
    "EXACT",
    "Architecture",
    "LatentVariableModel",
    "Particles",
    "gradients",
]


@contextmanager
def gradients() -> Generator[None]:
    """Where gradients can be asked for, also of a caller in inference mode.

    What was made in that mode must be copied before autograd may keep it.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


T = TypeVar("T")
EXACT = "exact"
CACHED_ROWS = 2048
"""Particles that are decoded at once on a CPU where nobody keeps their pixels."""


@dataclass(frozen=True)
class Particles:
    """Latents with every log-density that an objective or an estimator needs of them."""

    latents: Latents
    log_likelihood: PerParticle
    """log p(x_o | z)."""
    log_prior: PerParticle
    proposal: Proposal
    parameters: Pixels | None = None
    """What the decoder made of the latents; None where nobody looks at it."""
    expected_log_missing: PerParticle | None = None
    """E log p(x_m | z) under p(x_m | z), without gradient; None where nobody asked for it."""

    warmth: float | Float[Tensor, ""] = 1.0
    """The part of log p(z) and log q(z) that counts, which early in training may be less."""

    @property
    def log_joint(self) -> PerParticle:
        """The logarithm of p(x_o, z)."""
        return self.log_likelihood + self.warmth * self.log_prior

    @cached_property
    def log_weights(self) -> PerParticle:
        """The logarithm of w = p(x_o, z) / q(z)."""
        return self.log_weights_under(self.proposal)

    def log_weights_under(self, proposal: Proposal) -> PerParticle:
        """The logarithm of w with the density of a proposal that is perhaps held constant."""
        return self.log_joint - self.warmth * proposal.log_density(self.latents)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is rebuilt from: names in the tables of networks and their sizes."""

    image_shape: ImageShape = (1, 28, 28)
    latent: int = 40
    """Latents that the decoder sees."""
    upper: int = 0
    """Latents of a second stochastic layer above them; 0 is none."""
    encoder: str = "mlp"
    """Or exact: a linear decoder and Gaussian pixels need none."""
    decoder: str = "mlp"
    hidden: tuple[int, ...] = (300, 300)
    """Widths of the layers between; of gated-conv those between the latents and the planes."""
    upper_hidden: tuple[int, ...] = (100, 100)
    """Widths of the layers between the stochastic layers."""
    likelihood: str = "bernoulli"
    proposal_variance: float = 1.0
    """A factor of the variance that the encoder gives."""

    @property
    def latents(self) -> int:
        """Of all stochastic layers together."""
        return self.latent + self.upper

    def build(self, noise: Noise) -> "LatentVariableModel":
        """A model with fresh weights.

        Raises:
            ValueError: There is no such network or likelihood, or the parts do not go together.
        """
        exact = self.encoder == EXACT
        if exact and (self.decoder, self.likelihood, self.upper) != ("linear", "gaussian", 0):
            raise ValueError(
                f"Expected a linear decoder, gaussian pixels and one stochastic layer with the "
                f"{EXACT} encoder; got {self.decoder}, {self.likelihood} and {self.upper} upper "
                "latents."
            )
        sizes = {
            "image_shape": self.image_shape,
            "latent": self.latent,
            "hidden": self.hidden,
        }
        generator = noise.at("encoder").generator()
        return LatentVariableModel(
            encoder=Exact() if exact else ENCODERS[self.encoder](**sizes, generator=generator),
            upper_encoder=self._between(self.latent, self.upper, noise.at("upper encoder")),
            decoder=DECODERS[self.decoder](**sizes, generator=noise.at("decoder").generator()),
            prior=self._prior(noise.at("prior")),
            likelihood=LIKELIHOODS[self.likelihood](self.image_shape),
            architecture=self,
        )

    def _prior(self, noise: Noise) -> Prior:
        network = self._between(self.upper, self.latent, noise)
        if network is None:
            return StandardNormal(self.latent)
        return StackedPrior(self.latent, self.upper, network)

    def _between(self, inputs: int, outputs: int, noise: Noise) -> Gaussian | None:
        if not self.upper:
            return None
        return Gaussian((inputs, *self.upper_hidden, 2 * outputs), noise.generator())


class Exact(nn.Module):
    """In place of an encoder, where the posterior is a closed form."""


class LatentVariableModel(nn.Module):
    """A prior, a decoder with its likelihood, and an encoder that proposes latents."""

    def __init__(
        self,
        *,
        encoder: nn.Module,
        upper_encoder: nn.Module | None,
        decoder: nn.Module,
        prior: Prior,
        likelihood: Likelihood,
        architecture: Architecture,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.upper_encoder = upper_encoder
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood
        self.architecture = architecture
        self.stack: tuple[int, ...] = ()
        """How many models this is, each with its part of every batch; one model is no stack."""

    def compiled(self) -> "LatentVariableModel":
        """The same model, which sums pixels in machine code where there is a compiler for it."""
        header = Path(sysconfig.get_path("include"), "Python.h")
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if isinstance(self.likelihood, Bernoulli) and compiler is not None and header.exists():
            # calls from C++ let go of Python's lock, for which other threads would wait
            here = self.device.type == "cpu"
            sums = torch.compile(bernoulli_sums, options={"cpp_wrapper": here})
            self.likelihood = replace(self.likelihood, compiled=sums)
        return self

    def frozen(self) -> "LatentVariableModel":
        """The same model, whose weights stay as they are: without gradients, and made quick."""
        self.eval().requires_grad_(requires_grad=False)
        if isinstance(self.decoder, MlpDecoder):
            self.decoder.pack()
        return self

    def prior_parameters(self) -> Iterator[nn.Parameter]:
        """The part of θ that p(z) has."""
        return (p for name, p in self.named_parameters() if name.startswith("prior."))

    def phi(self) -> Iterator[nn.Parameter]:
        """The parameters of q(z | x), the encoders'."""
        named = self.named_parameters()
        return (p for name, p in named if name.startswith(("encoder.", "upper_encoder.")))

    def encode(
        self, fillings: Float[Tensor, "batch components channels height width"]
    ) -> GaussianMixture | Stacked:
        """The mixture of q(z | x̆) over several fillings of each image's holes."""
        mean, log_std = self.encoder(fillings)
        wider = 0.5 * math.log(self.architecture.proposal_variance)
        mixture = GaussianMixture(mean, log_std + wider)
        return Stacked(mixture, self.upper_encoder) if self.upper_encoder else mixture

    @property
    def exact(self) -> FactorAnalysis | None:
        """The model in double precision where its posterior is a closed form; else None."""
        if not isinstance(self.encoder, Exact):
            return None
        assert isinstance(self.decoder, LinearDecoder)
        assert isinstance(self.likelihood, GaussianPixels)
        layer = self.decoder.layer
        variance = (2 * self.likelihood.log_std.double()).exp().flatten()
        return FactorAnalysis(layer.weight.double(), layer.bias.double(), variance)

    def posterior(self, images: Incomplete) -> CorrelatedMixture:
        """The exact p(z | x_o) of a model that has one, in the precision of the images."""
        assert self.exact is not None
        found = self.exact.posterior(images)
        return CorrelatedMixture(found.mean.to(images.values), found.factor.to(images.values))

    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch c h w"]:
        """The parameters of p(x | z), a plane a channel, in the latents' precision."""
        return self._decoded(latents).to(latents)

    def zero_filled(self, images: Incomplete) -> GaussianMixture | Stacked:
        """q(z | (x_o, 0)), the proposal of missIWAE (Mattei and Frellsen, 2019)."""
        return self.encode(images.values[:, None])

    def two_pass(
        self, images: Incomplete, noise: Source, *, imputations: int, first: bool = False
    ) -> GaussianMixture | Stacked:
        """q(z | (x_o, x̆_m)) with x̆_m ~ p(x_m | z̆), z̆ ~ q(z | (x_o, 0)): that of miss-IWEM.

        With several imputations it is the mixture over them, and with `first` q(z | (x_o, 0)) is
        one more component of it.
        """
        with torch.no_grad():
            latents = self.zero_filled(images).draw(imputations, noise.at("first"))
            fillings = self.impute(images, latents, noise.at("filling"))
        if first:
            fillings = torch.cat([images.values[:, None], fillings], 1)
        return self.encode(fillings)

    def own(
        self, images: Incomplete, noise: Source, *, two_pass: bool = True
    ) -> GaussianMixture | Stacked:
        """The proposal of one pass or of two, by which an encoder was trained."""
        if two_pass:
            return self.two_pass(images, noise, imputations=1)
        return self.zero_filled(images)

    def adapted(
        self, images: Incomplete, noise: Source, *, imputations: int = 64, rounds: int = 6
    ) -> GaussianMixture | Stacked:
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
        blank = ~images.observed.flatten(1).any(1)
        return proposal.standard_where(blank)

    def impute(self, images: Incomplete, latents: Latents, noise: Source) -> Pixels:
        """The images with x_m ~ p(x_m | z) for each of the latents."""
        logits = self.decode(latents)
        sample = self.likelihood.sample(logits, noise.uniform(*logits.shape, like=logits))
        return torch.where(images.observed[:, None], images.values[:, None], sample)

    def particles(
        self, images: Incomplete, proposal: Proposal, latents: Latents, *, keep: bool = True
    ) -> Particles:
        """The log-densities of these latents, which the proposal drew.

        Who does not look at the decoder's output need not keep it.
        """
        if keep:
            logits = self.decode(latents)
            density = self.likelihood.log_density(logits, images)
        else:
            parts = self.by_pieces(self.likelihood.log_density, latents, images)
            logits, density = None, torch.cat(parts)
        log_prior = self.prior.log_density(latents)
        return Particles(latents, density, log_prior, proposal, logits)

    def tangents(self, standard: Latents) -> Float[Tensor, "batch particles latents pixels"]:
        """The derivatives of the decoder's output in the numbers that the prior makes latents of.

        They have no gradient of their own.
        """
        rows, decoder = standard.flatten(0, 1), self.decoder
        with torch.no_grad():
            if not isinstance(decoder, MlpDecoder | LinearDecoder):
                found = _derivatives(lambda u: self.decode(self.prior.from_standard(u)), rows)
            else:
                latents = self.prior.from_standard(rows)
                found = decoder.tangents(latents[..., : self.architecture.latent])
                if self.architecture.upper:
                    between = _derivatives(self.prior.from_standard, rows)
                    found = between[..., : self.architecture.latent] @ found
        return found.unflatten(0, standard.shape[:2])

    def standard_log_joint(self, images: Incomplete, standard: Latents) -> PerParticle:
        """Log p(x_o | z) + log N(u; 0, I) of the numbers u that the prior makes latents of."""
        decoded = self.decode(self.prior.from_standard(standard))
        normal = StandardNormal(standard.shape[-1]).log_density(standard)
        return self.likelihood.log_density(decoded, images) + normal

    def by_pieces(
        self, of: Callable[[Pixels, Incomplete], T], latents: Latents, images: Incomplete
    ) -> list[T]:
        """A function of the decoder's output and the images, of a few images at a time.

        Their pixels then fill the caches of a CPU, not more. They come as the decoder's products
        give them: in bf16 where autocast has it.
        """
        count = len(images)
        whole = self.stack or latents.device.type != "cpu"
        at_once = count if whole else max(1, CACHED_ROWS // latents.shape[1])
        parts = (slice(first, first + at_once) for first in range(0, count, at_once))
        return [of(self._decoded(latents[part]), images[part]) for part in parts]

    def _decoded(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch c h w"]:
        return self.decoder(latents[..., : self.architecture.latent])

    def sample(self, count: int, noise: Noise) -> Float[Tensor, "batch channels height width"]:
        """Images from the model itself."""
        latents = self.prior.draw(count, noise, like=next(self.parameters()))
        logits = self.decode(latents)
        uniforms = noise.at("pixels").uniform(*logits.shape, like=logits)
        return self.likelihood.sample(logits, uniforms)

    @property
    def dense(self) -> bool:
        """Whether the decoder is a few products, for which the calls cost as much as the rows."""
        return isinstance(self.decoder, MlpDecoder | LinearDecoder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


ONE_AT_A_TIME = threading.Lock()
"""PyTorch counts the levels of forward derivatives for all threads together."""


def _derivatives(
    of: Callable[[Tensor], Tensor], rows: Float[Tensor, "rows inputs"]
) -> Float[Tensor, "rows inputs outputs"]:
    """Of a function of rows, each by itself."""

    def one(row: Tensor) -> Tensor:
        return of(row[None])[0].flatten()

    with ONE_AT_A_TIME, torch.inference_mode(mode=False):  # which has not even forward ones
        return torch.func.vmap(torch.func.jacfwd(one))(rows.clone()).mT
