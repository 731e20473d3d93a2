r"""Estimates of log p(x_o), and of log p(x_m | x_o) where the missing pixels are known.

With particles $z_k \sim q$ and weights $w_k = p(x_o, z_k) / q(z_k)$,

$$ \log \hat p(x_o) = \log \tfrac1K \sum_k w_k, \qquad
   \log \hat p(x_m \mid x_o) = \log \sum_k \tilde w_k\, p(x_m \mid z_k), \qquad
   \tilde w_k = w_k / \textstyle\sum_j w_j . $$

The first is a lower bound in expectation.
The second is a normalised distribution over $x_m$ for any particles, so that no bad proposal can
flatter it. Both are folds over blocks of particles, and their standard errors are Monte Carlo
errors by the delta method: of the first $\sqrt{1/\mathrm{ESS} - 1/K}$, of the second that of
a ratio.
They are not to be believed when the Pareto shape $\hat k$ of the weights is above 0.7.
"""

import math
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from model.adaptation import DEFENSIVE
from model.laplace import laplace
from model.latent import EXACT, LatentVariableModel
from model.masks import Incomplete
from model.noise import Source
from model.pixels import PerParticle, Pixels
from model.proposal import (
    Amortised,
    Blend,
    CorrelatedMixture,
    Latents,
    PriorProposal,
    Proposal,
    Standardised,
)
from model.refinement import Refinement
from model.stages import Stages, finish
from model.weights import RELIABLE_PARETO_K, WeightSums, log_add, resample

__all__ = [
    "BLOCK",
    "PROPOSALS",
    "Block",
    "Estimate",
    "Predictive",
    "Scores",
    "blocks",
    "encode",
    "estimate_of",
    "modes",
    "precise",
    "proposed",
    "score",
]

BLOCK = 64
"""Particles that are drawn together. Every block is whole, whatever is asked for, so that the
same particle has the same bits in every request."""
FEWEST_EFFECTIVE = 10
"""Particles that must count before an answer is trusted: draws are taken from among them."""
AT_ONCE = 16
"""Blocks that a dense decoder works on together, for the calls that it saves."""
KEPT = 4
"""Those that are given out together where the decoder's output is kept, or it is looked at after
each time whether they are enough."""
DRAWING = threading.Lock()
"""Small calls give Python's own lock away, for which threads that draw at a time would wait."""
PIXELS = 2**20
"""Of the decoder's output, for which more blocks than are given out are made at a time."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate of each image's log-probability, in nats, and what is known of its error."""

    value: Float[Tensor, " batch"]
    standard_error: Float[Tensor, " batch"]
    effective_sample_size: Float[Tensor, " batch"]
    pareto_k: Float[Tensor, " batch"]
    """NaN when there were too few particles to tell."""
    particles: int
    estimator: str
    kind: str
    """What the number is: a lower bound in expectation, debiased, a ratio of means, a difference
    of two of these, or exact."""
    acceptance: Float[Tensor, " batch"] | None = None
    """The part of the transitions that were accepted, where there are chains."""

    @property
    def reliable(self) -> Bool[Tensor, " batch"]:
        """Whether the standard error may be believed."""
        return self.pareto_k <= RELIABLE_PARETO_K

    @property
    def doubtful(self) -> Bool[Tensor, " batch"]:
        """Of which images a better quality should be tried.

        It is where the tail of the weights is too heavy for the error to be believed, or few
        particles count. Of less than a block of particles nothing can be told.
        """
        if self.particles < BLOCK:
            return torch.zeros_like(self.value, dtype=torch.bool)
        return ~self.reliable | (self.effective_sample_size < FEWEST_EFFECTIVE)


@dataclass(frozen=True)
class Block:
    """Particles and their weights, which were computed of whole blocks."""

    latents: Latents
    log_weights: PerParticle
    parameters: Pixels | None
    """What the decoder made of the latents; None where it was not kept."""

    def first(self, count: int) -> "Block":
        """The first of them; all where there are no more."""
        if count >= self.latents.shape[1]:
            return self
        return next(self.split(count))

    def split(self, size: int) -> Iterator["Block"]:
        """So many at a time."""
        for first in range(0, self.latents.shape[1], size):
            part = slice(first, first + size)
            parameters = None if self.parameters is None else self.parameters[:, part]
            yield Block(self.latents[:, part], self.log_weights[:, part], parameters)


@dataclass(frozen=True)
class Scores:
    """log p(x_o), and log p(x_m | x_o) where the truth was given."""

    log_likelihood: Estimate
    conditional: Estimate | None


def _amortised(model: LatentVariableModel, images: Incomplete, noise: Source) -> Proposal:
    """The encoder's mixture over several imputations."""
    return encode(model, images, noise)


def _own(model: LatentVariableModel, images: Incomplete, noise: Source) -> Proposal:
    """The encoder's proposal as in training: what `raw` scores are made with."""
    return model.own(images, noise)


def _prior(model: LatentVariableModel, images: Incomplete, _noise: Source) -> Proposal:
    """Naive Monte Carlo: it has nothing to do with the image."""
    return PriorProposal(model.prior, images.values)


def _zero_filled(model: LatentVariableModel, images: Incomplete, _noise: Source) -> Proposal:
    return model.zero_filled(images)


def _adapted(model: LatentVariableModel, images: Incomplete, noise: Source) -> Proposal:
    """The mixture over adapted imputations."""
    return model.adapted(images, noise)


def _laplace(model: LatentVariableModel, images: Incomplete, noise: Source) -> Stages[Proposal]:
    """Gaussians at modes, and a share of what could reach elsewhere: what is served."""
    encoded = encode(model, images, noise)
    yield
    mixture = yield from modes(model, images, encoded, noise)
    there = Standardised(mixture, model.prior) if model.architecture.upper else mixture
    prior = PriorProposal(model.prior, images.values)
    return Blend([there, encoded, prior], [1 - ENCODED - DEFENSIVE, ENCODED, DEFENSIVE])


def _semi_amortised(model: LatentVariableModel, images: Incomplete, noise: Source) -> Proposal:
    """A few steps up the ELBO from what the encoder says."""
    first = model.own(images, noise.at("first"))
    return Refinement(steps=20).refined(model, images, first, noise.at("refined"))


def _svi(model: LatentVariableModel, images: Incomplete, noise: Source) -> Proposal:
    """Many steps up the ELBO from N(0, I), without what the encoder says of this image."""
    encoded = model.zero_filled(images)
    nowhere = encoded.standard_where(torch.ones(len(images), device=images.values.device).bool())
    return Refinement(steps=100).refined(model, images, nowhere, noise.at("refined"))


PROPOSALS: dict[
    str, Callable[[LatentVariableModel, Incomplete, Source], Proposal | Stages[Proposal]]
] = {
    "adapted": _adapted,
    "amortised": _amortised,
    "laplace": _laplace,
    "own": _own,
    "prior": _prior,
    "semi-amortised": _semi_amortised,
    "svi": _svi,
    "zero-filled": _zero_filled,
}


def encode(model: LatentVariableModel, images: Incomplete, noise: Source) -> Amortised:
    """What the encoder makes of several imputations; where nothing was observed, N(0, I)."""
    mixture = model.two_pass(images, noise.at("encoded"), imputations=IMPUTATIONS)
    return mixture.standard_where(~images.observed.flatten(1).any(1))


def modes(
    model: LatentVariableModel, images: Incomplete, encoded: Proposal, noise: Source
) -> Stages[CorrelatedMixture]:
    """Laplace's mixture over standard latents, begun at likely ones of the encoder's."""
    latents = encoded.draw(BLOCK, noise.at("start"))
    log_w = model.particles(images, encoded, latents, keep=False).log_weights
    uniforms = noise.at("pick").uniform(len(images), MODES, like=log_w)
    picked = resample(log_w / SOFTNESS, uniforms)[..., None].expand(-1, -1, latents.shape[-1])
    yield
    starts = model.prior.to_standard(latents.gather(1, picked))
    return (yield from laplace(model, images, starts))


IMPUTATIONS, MODES, SOFTNESS = 16, 4, 5.0
"""Of the mixture that modes are looked for from; how many; and the root of their weights."""
ENCODED = 0.1
"""Share of the particles that comes from the encoder's mixture."""


def proposed(
    model: LatentVariableModel, images: Incomplete, noise: Source, proposal: str | Proposal
) -> Stages[Proposal]:
    """The proposal of a name, or the posterior itself of a model that has it in closed form.

    What is a distribution already stays as it is.
    """
    if not isinstance(proposal, str):
        return proposal
    if model.exact is not None:
        return model.posterior(images)
    made = PROPOSALS[proposal](model, images, noise)
    return (yield from made) if isinstance(made, Generator) else made


def blocks(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    proposal: str | Proposal = "laplace",
    keep: bool = True,
    may_stop: bool = False,
) -> Iterator[Block]:
    """So many particles of each image in blocks; more of them begin with the same ones.

    Several blocks are given out as one; how many, depends on nothing but the model and on what
    is to be kept. Where nobody may stop before the end, more than these are made together.
    A proposal that is a name is found without a pause.
    """
    distribution = finish(proposed(model, images, noise.at("proposal"), proposal))
    count = math.ceil(particles / BLOCK)
    given = made = 1
    if model.dense:
        given = KEPT if keep or may_stop else AT_ONCE
        room = min(AT_ONCE, PIXELS // (BLOCK * images.values.numel()))
        made = given if may_stop else max(given, room // given * given)
    for first in range(0, count, made):
        group = range(first, min(first + made, count))
        with DRAWING:
            drawn = [distribution.draw(BLOCK, noise.at("block", index)) for index in group]
        whole = model.particles(images, distribution, torch.cat(drawn, 1), keep=keep)
        block = Block(whole.latents, whole.log_weights, whole.parameters)
        yield from block.first(particles - first * BLOCK).split(given * BLOCK)


def score(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    proposal: str | Proposal = "laplace",
    truth: Float[Tensor, "batch channels height width"] | None = None,
    known: Bool[Tensor, "batch channels height width"] | None = None,
    tolerance: float | None = None,
) -> Stages[Scores]:
    """Each image's log p(x_o) and, where the complete images are given, log p(x_m | x_o).

    Where not all of the truth is `known`, x_m are the missing pixels of which it is.
    With a tolerance, in nats, no more particles are drawn than bring both standard errors below
    it. Of a model with a closed form the first is exact, unless another proposal was given.
    """
    sums = WeightSums.empty(len(images), particles=particles, like=images.values)
    predictive = Predictive.empty(len(images), particles=particles, like=images.values)
    keep = truth is not None
    judged = ~images.observed if known is None else known & ~images.observed
    distribution = yield from proposed(model, images, noise.at("proposal"), proposal)
    for block in blocks(
        model,
        images,
        noise,
        particles=particles,
        proposal=distribution,
        keep=keep,
        may_stop=tolerance is not None,
    ):
        log_w = block.log_weights
        sums = sums.update(log_w)
        if truth is not None:
            assert block.parameters is not None
            log_missing = model.likelihood.log_density_of(block.parameters, truth, judged)
            predictive = predictive.update(log_w, log_missing)
        if tolerance is not None and precise(sums, tolerance):
            also = None if truth is None else predictive.estimate(sums)
            if also is None or bool((also.standard_error <= tolerance).all()):
                break
        yield
    found = exactly(model, images, proposal, estimate_of(sums))
    if truth is None:
        return Scores(found, None)
    conditional = predictive.estimate(sums)
    if found.kind == EXACT:
        whole = Incomplete.hide(images.fill(truth), images.observed | judged)
        value = exactly(model, whole, proposal, conditional).value - found.value
        conditional = replace(found, value=value)
    return Scores(found, conditional)


def precise(sums: WeightSums, tolerance: float) -> bool:
    """Whether every image's log p(x_o) is known to this standard error, and that beyond doubt."""
    if bool((sums.standard_error > tolerance).any()):
        return False
    return not bool(estimate_of(sums).doubtful.any())


def exactly(
    model: LatentVariableModel, images: Incomplete, proposal: str | Proposal, found: Estimate
) -> Estimate:
    """The exact log p(x_o) of a model with a closed form, or what was found.

    A proposal that is no name was given to be tried, and what it finds is the answer.
    """
    exact = model.exact
    if exact is None or not isinstance(proposal, str):
        return found
    value = exact.log_likelihood(images).to(found.value)
    none = torch.zeros_like(value)
    return replace(
        found, value=value, standard_error=none, pareto_k=none, estimator=EXACT, kind=EXACT
    )


def estimate_of(sums: WeightSums) -> Estimate:
    """The importance-sampling estimate of log p(x_o) that the sums amount to."""
    return Estimate(
        value=sums.log_mean,
        standard_error=sums.standard_error,
        effective_sample_size=sums.effective_sample_size,
        pareto_k=sums.pareto_k,
        particles=sums.particles,
        estimator="importance",
        kind="lower bound",
    )


@dataclass(frozen=True)
class Predictive:
    """Fold: the sums of w·p(x_m | z) that log p(x_m | x_o) needs beside those of w."""

    joint: WeightSums
    log_sum_crossed: Float[Tensor, " batch"]
    """log Σ w²·p(x_m | z), for the covariance of numerator and denominator."""

    @classmethod
    def empty(cls, batch: int, *, particles: int, like: Tensor) -> "Predictive":
        """The sums of nothing."""
        joint = WeightSums.empty(batch, particles=particles, like=like)
        return cls(joint, joint.log_sum)

    def update(
        self, log_weights: Float[Tensor, "batch block"], log_missing: Float[Tensor, "batch block"]
    ) -> "Predictive":
        """The sums with one more block."""
        log_w, log_p = log_weights.double(), log_missing.double()
        crossed = (2 * log_w + log_p).logsumexp(-1)
        return Predictive(self.joint.update(log_w + log_p), log_add(self.log_sum_crossed, crossed))

    def estimate(self, sums: WeightSums) -> Estimate:
        """The estimate of log p(x_m | x_o), given the sums of the same particles' weights."""
        relative = (
            1 / self.joint.effective_sample_size
            + 1 / sums.effective_sample_size
            - 2 * (self.log_sum_crossed - self.joint.log_sum - sums.log_sum).exp()
        )
        return Estimate(
            value=self.joint.log_sum - sums.log_sum,
            standard_error=relative.clamp(min=0).sqrt(),
            effective_sample_size=self.joint.effective_sample_size,
            pareto_k=torch.maximum(sums.pareto_k, self.joint.pareto_k),
            particles=sums.particles,
            estimator="self-normalised importance",
            kind="ratio of means",
        )
