r"""Laplace's approximation: Gaussians at modes of the posterior, with the curvature there.

From wherever it starts, each component climbs $\log p(x_o, z)$ by damped Gauss-Newton steps,

$$ H = I + J^\top C J, \qquad z \leftarrow z + \eta\, H^{-1} (J^\top s - z), $$

where $J$ is the decoder's Jacobian, $s$ the slope of $\log p(x_o \mid z)$ in the decoder's output
and $C$ minus its curvature, both zero where a pixel is missing. $H$ is positive definite whatever
the decoder is, and $N(z, H^{-1})$ at the end has the correlations of the posterior, which no
encoder's diagonal Gaussian has (MacKay, "Information theory, inference, and learning algorithms",
2003, section 27). It needs no encoder and holds for any mask.
The latents are those independent N(0, 1) numbers that the prior makes its latents of, so that
models of two stochastic layers are no exception.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.proposal import CorrelatedMixture, Latents
from model.stages import Stages

__all__ = ["laplace"]

STEPS = 4
RATES = (1.0, 0.5, 0.25, 0.1, 0.0)
"""Parts of a step that are tried; that of the highest p(x_o, z) is taken."""
WIDER = 1.1
"""A factor of the standard deviations: a proposal may be too wide, but not too narrow."""


@torch.no_grad()
def laplace(
    model: LatentVariableModel, images: Incomplete, starts: Latents, *, steps: int = STEPS
) -> Stages[CorrelatedMixture]:
    """A mixture over standard latents, with a component for each of an image's starts.

    Where nothing was observed it is N(0, I).
    """
    z = starts
    for _ in range(steps):
        precision, gradient = _curvature(model, images, z)
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(precision))
        z = _climbed(model, images, z, step[..., 0])
        yield
    precision, _ = _curvature(model, images, z)
    found = CorrelatedMixture.of_precision(z, precision)
    seen = images.observed.flatten(1).any(1)[:, None, None, None]
    return CorrelatedMixture(z, torch.where(seen, WIDER, 1.0) * found.factor)


def _climbed(model: LatentVariableModel, images: Incomplete, z: Latents, step: Latents) -> Latents:
    """The best of several points along the steps, of which where they begin is one."""
    rates = z.new_tensor(RATES)[:, None]
    tried = z[:, :, None] + rates * step[:, :, None]
    height = model.standard_log_joint(images, tried.flatten(1, 2))
    best = height.unflatten(1, tried.shape[1:3]).argmax(-1)
    picked = best[..., None, None].expand(-1, -1, 1, z.shape[-1])
    return tried.gather(2, picked)[:, :, 0]


def _curvature(
    model: LatentVariableModel, images: Incomplete, z: Latents
) -> tuple[Float[Tensor, "batch starts latent latent"], Latents]:
    """H, and the gradient of log p(x_o, z)."""
    tangents = model.tangents(z)
    parameters = model.decode(model.prior.from_standard(z))
    slope = model.likelihood.slope(parameters, images).flatten(2)
    curvature = model.likelihood.curvature(parameters, images).flatten(2)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    precision = identity + (tangents * curvature[..., None, :]) @ tangents.mT
    return precision, (tangents @ slope[..., None])[..., 0] - z
