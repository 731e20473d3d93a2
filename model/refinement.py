r"""Stochastic variational inference: an image's own proposal, climbed by gradient.

The encoder gives each image a first $\lambda = (\mu, \log\sigma)$, and steps on the image's own

$$ \mathrm{ELBO}(\lambda) = E_{q(z; \lambda)}[\log p(x_o, z) - \log q(z; \lambda)] $$

go on from there (Kim et al., "Semi-amortized variational autoencoders", 2018).
The steps are along the natural gradient of a Gaussian, $\sigma^2 \nabla_\mu$ and
$\tfrac12 \nabla_{\log\sigma}$ (Hoffman et al., "Stochastic variational inference", 2013),
whose length is one whatever the scale of the latents, and none is longer than a standard
deviation.
"""

from dataclasses import dataclass

import torch

from model.latent import LatentVariableModel, gradients
from model.masks import Incomplete
from model.noise import Source
from model.proposal import Amortised, GaussianMixture

__all__ = ["Refinement"]

LONGEST = 1.0
"""No step is longer, in standard deviations of the mean or e-folds of the standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """So many steps of each image's own proposal up its ELBO."""

    steps: int
    rate: float = 0.1
    particles: int = 8
    """Samples of the ELBO in a step."""
    through: bool = False
    """Whether gradient flows through the steps to where they began."""

    def refined(
        self, model: LatentVariableModel, images: Incomplete, proposal: Amortised, noise: Source
    ) -> Amortised:
        """The proposal after the steps."""
        through = self.through and torch.is_grad_enabled()
        with gradients():
            mixture, images = proposal.lower if through else proposal.lower.copy(), images.copy()
            for index in range(self.steps):
                here = mixture if through else mixture.leaf()
                source = noise.at("step", index)
                mixture = self._stepped(
                    model, images, proposal.above(here), source, through=through
                )
        return proposal.above(mixture)

    def _stepped(
        self,
        model: LatentVariableModel,
        images: Incomplete,
        proposal: Amortised,
        noise: Source,
        *,
        through: bool,
    ) -> GaussianMixture:
        here = proposal.lower
        latents = proposal.draw(self.particles, noise)
        elbo = model.particles(images, proposal, latents).log_weights.mean(-1).sum()
        to_mean, to_log_std = torch.autograd.grad(
            elbo, [here.mean, here.log_std], create_graph=through
        )
        rate = self.rate * here.mean.shape[1]
        std = here.log_std.exp()
        moved = GaussianMixture(
            here.mean + std * (rate * std * to_mean).clamp(-LONGEST, LONGEST),
            here.log_std + (rate * 0.5 * to_log_std).clamp(-LONGEST, LONGEST),
        )
        return moved if through else moved.detach()
