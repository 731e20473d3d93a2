r"""What a model is made of, and whether what it says comes true.

A latent is used where its posterior mean differs between images: it is active if

$$ \mathrm{Var}_x\, \mathbb E_{q(z \mid x)}[z] > 0.01 $$

(Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016). What a bound loses
is of two kinds (Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders",
2018),

$$ \log p(x_o) - \mathcal L[q] = \underbrace{\log p(x_o) - \mathcal L[q^*]}_{\text{approximation}}
   + \underbrace{\mathcal L[q^*] - \mathcal L[q]}_{\text{amortisation}}, $$

where $q^*$ is the best Gaussian of the encoder's kind for each image by itself.
Probabilities are calibrated where of the pixels that are said to be one with probability $p$ a
share of $p$ is one; draws are, where the truth is like one of them: where its rank among them,
by whatever is counted of an image, is uniform.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.estimators import Quality, estimate
from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Source
from model.proposal import Proposal, Stacked, StackedPrior
from model.refinement import Refinement
from model.stages import Stages

__all__ = [
    "ACTIVE",
    "ELBO_PARTICLES",
    "Calibration",
    "Gaps",
    "Use",
    "anomaly",
    "calibration",
    "gaps",
    "latent_use",
    "ranks",
    "uniformity",
]

ACTIVE = 0.01
"""The variance over images from which on a latent's mean is used."""
REFINED, ELBO_PARTICLES = 200, 256
"""Steps to the best Gaussian of an image, and the particles that an ELBO is the mean of."""
BINS, UNSURE = 18, (0.05, 0.95)
"""Of the probabilities, and those of pixels that are not all but certain."""


@dataclass(frozen=True)
class Use:
    """How much each latent is used; those that the decoder sees come first."""

    variance: Float[Tensor, " latent"]
    """Over images, of the mean that the encoder gives it."""
    divergence: Float[Tensor, " latent"]
    """Its part of the mean KL(q(z | x) ‖ p(z)), in nats, to which they add up."""

    @property
    def active(self) -> int:
        """How many latents are."""
        return int((self.variance > ACTIVE).sum())


@torch.no_grad()
def latent_use(
    model: LatentVariableModel, images: Incomplete, noise: Source, *, two_pass: bool = True
) -> Use:
    r"""How the latents are used on these images, by the encoder's proposal.

    That sees them filled by the model, or without `two_pass` with zeros, as in training.
    Of two stochastic layers the lower one's part is that of $\mathbb E_q[\log q(z_1 \mid x) -
    \log p(z_1 \mid z_2)]$, by draws, and the upper one's of $\mathbb E_q[\mathrm{KL}(q(z_2 \mid
    z_1) \,\|\, p(z_2))]$.
    """
    if model.exact is not None:
        posterior = model.posterior(images)
        mean, log_std = posterior.mean[:, 0], 0.5 * posterior.factor[:, 0].square().sum(-1).log()
        return Use(mean.var(0), _divergence(mean, log_std).mean(0))
    proposal = model.own(images, noise, two_pass=two_pass)
    mean, log_std = proposal.lower.mean[:, 0], proposal.lower.log_std[:, 0]
    if not isinstance(proposal, Stacked) or not isinstance(model.prior, StackedPrior):
        return Use(mean.var(0), _divergence(mean, log_std).mean(0))
    z1, z2 = proposal.draw(ELBO_PARTICLES, noise.at("draws")).split(
        [model.prior.lower, model.prior.upper.size], -1
    )
    above, log_std_above = proposal.network(z1)
    below, log_std_below = model.prior.network(z2)
    ratio = _log_normal(z1, mean[:, None], log_std[:, None]) - _log_normal(
        z1, below, log_std_below
    )
    upper = _divergence(above, log_std_above)
    return Use(
        torch.cat([mean.var(0), above.mean(1).var(0)]),
        torch.cat([ratio.mean((0, 1)), upper.mean((0, 1))]),
    )


def _divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(m, s²) ‖ N(0, 1)), number by number."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std


def _log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The logarithm of a Gaussian's density, number by number; up to a constant."""
    return -0.5 * ((z - mean) * (-log_std).exp()).square() - log_std


@dataclass(frozen=True)
class Gaps:
    """What the ELBO of each image loses, in nats."""

    amortisation: Float[Tensor, " batch"]
    """Of one encoder for all images."""
    approximation: Float[Tensor, " batch"]
    """Of a Gaussian with independent latents."""


def gaps(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    quality: Quality,
    particles: int,
    two_pass: bool = True,
) -> Stages[Gaps]:
    """The gaps of the encoder's proposal, with log p(x_o) by an estimator of this quality."""
    own = model.own(images, noise.at("own"), two_pass=two_pass)
    best = Refinement(steps=REFINED).refined(model, images, own, noise.at("best"))
    yield
    found = yield from estimate(
        model,
        images,
        noise.at("whole"),
        estimator=quality.estimator,
        particles=particles,
        proposal=quality.proposal,
    )
    of_own, of_best = (_elbo(model, images, q, noise.at("elbo")) for q in (own, best))
    return Gaps(of_best - of_own, found.value - of_best)


@torch.no_grad()
def _elbo(
    model: LatentVariableModel, images: Incomplete, proposal: Proposal, noise: Source
) -> Float[Tensor, " batch"]:
    latents = proposal.draw(ELBO_PARTICLES, noise)
    log_w = model.particles(images, proposal, latents, keep=False).log_weights
    return log_w.double().mean(-1)


@dataclass(frozen=True)
class Calibration:
    """Predicted probabilities and what came true, in bins of the first."""

    predicted: Float[Tensor, " bins"]
    came_true: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]

    @property
    def error(self) -> float:
        """The expected calibration error: how far the two are apart, for a pixel on average."""
        off = (self.predicted - self.came_true).abs()
        return ((self.count * off).sum() / self.count.sum().clamp(min=1)).item()


def calibration(
    probability: Float[Tensor, " pixels"], truth: Float[Tensor, " pixels"]
) -> Calibration:
    """Of binary pixels whose predicted probability is neither near 0 nor near 1."""
    low, high = UNSURE
    unsure = (probability >= low) & (probability < high)
    p, came = probability[unsure].double(), truth[unsure].double()
    index = ((p - low) / (high - low) * BINS).long().clamp(max=BINS - 1)
    count = index.bincount(minlength=BINS)
    sums = [index.bincount(weights, minlength=BINS) for weights in (p, came)]
    predicted, came_true = (total / count.clamp(min=1) for total in sums)
    return Calibration(predicted, came_true, count)


def ranks(
    draws: Float[Tensor, "batch draws channels height width"],
    truth: Float[Tensor, "batch channels height width"],
    noise: Source,
) -> Int[Tensor, " batch"]:
    """How many draws have less ink than the truth, where ties are broken by chance."""
    ink = torch.cat([truth[:, None], draws], 1).flatten(2).double().sum(-1)
    chance = noise.uniform(*ink.shape, like=ink)
    less = (ink[:, 1:] < ink[:, :1]) | (
        (ink[:, 1:] == ink[:, :1]) & (chance[:, 1:] < chance[:, :1])
    )
    return less.sum(1)


def uniformity(counts: Sequence[int]) -> float:
    """The p-value of Pearson's χ² test that each of the bins is as likely."""
    found = torch.tensor(counts, dtype=torch.float64)
    expected = found.sum() / len(found)
    statistic = ((found - expected).square() / expected).sum()
    freedom = torch.tensor(len(found) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def anomaly(
    model: LatentVariableModel,
    images: Incomplete,
    held_out: Float[Tensor, "references channels height width"],
    noise: Source,
    *,
    quality: Quality,
    particles: int,
) -> Stages[Float[Tensor, " batch"]]:
    """The share of held-out images that are less likely, each image under its own mask.

    Near 0 the image is unlike what the model was trained on.
    """
    below: list[Tensor] = []
    for index in range(len(images)):
        observed = images.observed[index].expand(held_out.shape)
        together = Incomplete.hide(
            torch.cat([images.values[index][None], held_out]),
            torch.cat([images.observed[index][None], observed]),
        )
        found = yield from estimate(
            model,
            together,
            noise.at("image", index),
            estimator=quality.estimator,
            particles=particles,
            proposal=quality.proposal,
        )
        below.append((found.value[1:] < found.value[0]).double().mean())
    return torch.stack(below)
