r"""Completions of images with holes.

The posterior $p(z \mid x_o)$ is represented by weighted particles, and so

$$ \mathbb E[x_m \mid x_o] = \sum_k \tilde w_k\, \mathbb E[x_m \mid z_k], \qquad
   x_m^{(i)} \sim p(x_m \mid z_{k_i}), \quad k_i \sim \tilde w, \quad i = 1, \dots, M. $$

The draws are made by sampling importance resampling with replacement, independently:
each has a latent of its own, so that they differ as the possible images differ and not as the
pixels' noise does. The standard deviation is that of $x_m$ given $x_o$, both sources together.
Observed pixels come back as they were.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel
from model.likelihood import Estimate, Stages, blocks, estimate_of
from model.masks import Incomplete
from model.noise import Source
from model.proposal import Proposal
from model.weights import Mean, Slots, WeightSums

__all__ = ["Completions", "impute"]


@dataclass(frozen=True)
class Completions:
    """What the holes may have held, and how likely what was seen is."""

    mean: Float[Tensor, "batch channels height width"]
    std: Float[Tensor, "batch channels height width"]
    """Zero where the pixel was seen."""
    draws: Float[Tensor, "batch draws channels height width"]
    log_likelihood: Estimate


def impute(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    draws: int = 1,
    proposal: str | Proposal = "laplace",
) -> Stages[Completions]:
    """The posterior mean and standard deviation of the missing pixels, and draws of them."""
    likelihood, latent = model.likelihood, model.architecture.latents
    sums = WeightSums.empty(len(images), particles=particles, like=images.values)
    slots = Slots.empty(len(images), draws, latent, like=images.values)
    mean, mean_square = Mean(), Mean()
    for index, block in enumerate(
        blocks(model, images, noise, particles=particles, proposal=proposal)
    ):
        log_w = block.log_weights
        share = sums.share(log_w)
        sums = sums.update(log_w)
        assert block.parameters is not None
        mean = mean.update(log_w, likelihood.mean(block.parameters), share)
        mean_square = mean_square.update(log_w, likelihood.mean_square(block.parameters), share)
        uniforms = noise.at("slot", index).uniform(len(images), draws, 2, like=images.values)
        slots = slots.update(log_w, block.latents, share, uniforms)
        yield
    variance = mean_square.value - mean.value**2
    return Completions(
        images.fill(mean.value),
        Incomplete.hide(variance.clamp(min=0).sqrt(), ~images.observed).values,
        model.impute(images, slots.chosen, noise.at("draws")),
        estimate_of(sums),
    )
