r"""Completions of images with holes.

The posterior $p(z \mid x_o)$ is represented by weighted particles, and so

$$ \mathbb E[x_m \mid x_o] = \sum_k \tilde w_k\, \mathbb E[x_m \mid z_k], \qquad
   x_m^{(i)} \sim p(x_m \mid z_{k_i}), \quad k_i \sim \tilde w, \quad i = 1, \dots, M. $$

The draws are made by sampling importance resampling with replacement, independently:
each has a latent of its own, so that they differ as the possible images differ and not as the
pixels' noise does. The standard deviation is that of $x_m$ given $x_o$, both sources together,
and a quantile is that of the mixture of the pixels' distributions, of resampled particles.
Observed pixels come back as they were.

The particles are those of a proposal or, where that is not good enough, the states of annealed
chains, each with the weight of its chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from model.annealing import LEAPFROGS
from model.estimators import CHAINS, Asked, annealed_estimate, chains
from model.estimators import rows as cost
from model.latent import LatentVariableModel
from model.likelihood import Block, Estimate, blocks, estimate_of, exactly, precise, proposed
from model.masks import Incomplete
from model.noise import Source
from model.proposal import Proposal
from model.stages import Stages
from model.weights import Mean, Slots, WeightSums

__all__ = ["Completions", "impute", "mixed", "rows"]

FURTHER = 7
"""Transitions of each chain after the last temperature, which make its states eight."""
MIXED = 256
"""Resampled particles whose pixels' mixture the quantiles are those of."""


@dataclass(frozen=True)
class Completions:
    """What the holes may have held, and how likely what was seen is."""

    mean: Float[Tensor, "batch channels height width"]
    std: Float[Tensor, "batch channels height width"]
    """Zero where the pixel was seen."""
    draws: Float[Tensor, "batch draws channels height width"]
    quantiles: Float[Tensor, "batch levels channels height width"]
    """Of each pixel by itself, at the levels that were asked for."""
    log_likelihood: Estimate


def impute(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    draws: int = 1,
    levels: Sequence[float] = (),
    proposal: str | Proposal = "laplace",
    estimator: str = "importance",
    tolerance: float | None = None,
) -> Stages[Completions]:
    """The posterior mean and standard deviation of the missing pixels, and draws of them.

    With a tolerance, no more particles are drawn than bring the standard error of log p(x_o)
    below so many nats; chains have one length.
    The estimator is `importance` or `annealed`. A model with a closed form has no need of chains.

    Raises:
        ValueError: There is no such estimator.
    """
    if estimator not in ROWS:
        raise ValueError(f"Expected an estimator of {', '.join(ROWS)}; got {estimator!r}.")
    asked = Asked(model, images, noise, particles, proposal)
    fold = _Posterior.empty(asked, draws, mixed(model, levels))
    if estimator == "annealed" and model.exact is None:
        found = yield from chains(asked, further=FURTHER)
        for index, latents in enumerate(found.latents.unbind(1)):
            fold = fold.update(Block(latents, found.log_weights, model.decode(latents)), index)
            yield
        log_likelihood = annealed_estimate(found)
    else:
        distribution = yield from proposed(model, images, noise.at("proposal"), proposal)
        whole = blocks(
            model,
            images,
            noise,
            particles=particles,
            proposal=distribution,
            may_stop=tolerance is not None,
        )
        for index, block in enumerate(whole):
            fold = fold.update(block, index)
            if tolerance is not None and precise(fold.sums, tolerance):
                break
            yield
        log_likelihood = exactly(model, images, proposal, estimate_of(fold.sums))
    return fold.completions(levels, log_likelihood)


def mixed(model: LatentVariableModel, levels: Sequence[float]) -> int:
    """Latents that the quantiles need; those of binary pixels are known from the mean."""
    return MIXED if levels and not model.likelihood.binary else 0


def rows(estimator: str, particles: int, *, resampled: int) -> int:
    """What completions cost beside the proposal, in rows of the decoder."""
    return cost(estimator, particles) + ROWS[estimator] + resampled


ROWS = {"importance": 0, "annealed": (FURTHER + 1) * CHAINS * (3 * LEAPFROGS + 1)}
"""Of what can be imputed with, and the rows beyond those of its estimate."""


@dataclass(frozen=True)
class _Posterior:
    """Fold: the moments of the pixels and resampled latents, of weighted particles."""

    asked: Asked
    sums: WeightSums
    chosen: Slots
    mixed: Slots
    mean: Mean
    mean_square: Mean

    @classmethod
    def empty(cls, asked: Asked, draws: int, mixed: int) -> "_Posterior":
        """The moments of nothing, with room for so many latents of either kind."""
        count, like = len(asked.images), asked.images.values
        size = asked.model.architecture.latents
        return cls(
            asked,
            WeightSums.empty(count, particles=asked.particles, like=like),
            Slots.empty(count, draws, size, like=like),
            Slots.empty(count, mixed, size, like=like),
            Mean(),
            Mean(),
        )

    def update(self, block: Block, index: int) -> "_Posterior":
        """The fold with one more block, which is the one of this index."""
        assert block.parameters is not None
        log_w, share = block.log_weights, self.sums.share(block.log_weights)
        likelihood = self.asked.model.likelihood
        mean = square = self.mean.update(log_w, likelihood.mean(block.parameters), share)
        if not likelihood.binary:  # of which x² = x
            values = likelihood.mean_square(block.parameters)
            square = self.mean_square.update(log_w, values, share)
        return replace(
            self,
            sums=self.sums.update(log_w),
            chosen=self._moved(self.chosen, block, share, "slot", index),
            mixed=self._moved(self.mixed, block, share, "mixed", index),
            mean=mean,
            mean_square=square,
        )

    def _moved(self, slots: Slots, block: Block, share: Tensor, purpose: str, index: int) -> Slots:
        count, draws, _ = slots.chosen.shape
        if not draws:
            return slots
        noise = self.asked.noise.at(purpose, index)
        uniforms = noise.uniform(count, draws, 2, like=slots.chosen)
        return slots.update(block.log_weights, block.latents, share, uniforms)

    def completions(self, levels: Sequence[float], log_likelihood: Estimate) -> Completions:
        """What the moments and the latents say of the holes."""
        model, images = self.asked.model, self.asked.images
        mean, mean_square = self.mean.value, self.mean_square.value
        quantiles = model.likelihood.quantiles(mean, model.decode(self.mixed.chosen), levels)
        return Completions(
            images.fill(mean),
            Incomplete.hide((mean_square - mean**2).clamp(min=0).sqrt(), ~images.observed).values,
            model.impute(images, self.chosen.chosen, self.asked.noise.at("draws")),
            torch.where(images.observed[:, None], images.values[:, None], quantiles),
            log_likelihood,
        )
