r"""What is maximised: the objectives, each a row of one table.

With $w_k = p(x_o, z_k) / q(z_k)$, $\tilde w = w / \sum w$ (detached)
and $z_k \sim q$ reparameterised:

$$ \text{VAE} = \tfrac1K \sum_k \log w_k, \qquad \text{IWAE} = \log \tfrac1K \sum_k w_k, \qquad
   \hat Q = \sum_k \tilde w_k \log p(x_o, z_k; \theta). $$

IWEM (Kim, Hwang and Kim, 2020) alternates three steps:
E, the weights; M, θ up $\alpha \hat Q + (1 - \alpha)\,\text{VAE}$; and P, φ up

$$ \hat L_{\text{opt}} = \log \tfrac1K \sum_k \frac{|\log p(x, z_k)|\; p(x_o, z_k)}{q(z_k)}, $$

where $p(x_m \mid z)$ cancels from the weight since the proposal draws $x_m$ from it,
and stands inside $|\log p(x, z)|$ as its expectation, detached.
The gradient of $\hat Q$ is that of IWAE (Proposition 1), and
$\nabla \log |\log p| = \nabla \log p / \log p$ is about one percent of $\nabla \log p$:
the P-steps of IWEM and IWAE are nearly the same.

An objective gives two scalars, one whose θ-gradient and one whose φ-gradient are the estimators;
every `detach` stands in this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel, Particles
from model.masks import Incomplete
from model.noise import Source
from model.pixels import PerParticle, Pixels
from model.proposal import Latents, Proposal
from model.refinement import Refinement
from model.weights import Thinned, log_mean_exp, normalise, thin

__all__ = [
    "M_STEPS",
    "OBJECTIVES",
    "P_SAMPLES",
    "P_STEPS",
    "Climbed",
    "Objective",
    "Surrogate",
    "ascend",
    "bound",
]

Scalar = Float[Tensor, ""]


@dataclass(frozen=True)
class Surrogate:
    """Two scalars: the θ-gradient of one and the φ-gradient of the other are the estimators."""

    decoder: Scalar
    encoder: Scalar

    def times(self, models: int) -> "Surrogate":
        """The sum over models, where this is their mean."""
        return Surrogate(models * self.decoder, models * self.encoder)


def elbo(particles: Particles) -> Float[Tensor, " batch"]:
    """E_q[log p(x_o, z) − log q(z)], by the mean over the particles."""
    return particles.log_weights.mean(-1)


def elbo_analytic(particles: Particles) -> Float[Tensor, " batch"]:
    """E_q[log p(x_o | z)] − KL(q ‖ p) with the divergence in closed form."""
    return particles.log_likelihood.mean(-1) - particles.warmth * particles.proposal.divergence()


def iwae(particles: Particles) -> Float[Tensor, " batch"]:
    """The logarithm of (1/K) Σ w (Burda, Grosse and Salakhutdinov, 2016)."""
    return log_mean_exp(particles.log_weights)


def expected_log_joint(particles: Particles) -> Float[Tensor, " batch"]:
    """Q̂(θ), the E-step by self-normalised importance sampling."""
    return (normalise(particles.log_weights).detach() * particles.log_joint).sum(-1)


def optimal(particles: Particles) -> Float[Tensor, " batch"]:
    """L̂_opt, the P-step towards the proposal |log p(x, z)|·p(x, z) (Owen, 2013)."""
    assert particles.expected_log_missing is not None
    log_p = particles.log_joint + particles.expected_log_missing.detach()
    return log_mean_exp(log_p.abs().log() + particles.log_weights)


def doubly_reparameterised(particles: Particles) -> Float[Tensor, " batch"]:
    """The DReG estimator of IWAE's φ-gradient, Σ w̃² ∇_z log w (Tucker et al., 2018).

    It is unbiased for independent particles. Those of a mixture use its components evenly and
    so depend on each other: with several imputations it is off by a little.
    """
    w = normalise(particles.log_weights).detach()
    log_w = particles.log_weights_under(particles.proposal.detach())
    return (w.square() * log_w).sum(-1)


def wake(particles: Particles) -> Float[Tensor, " batch"]:
    """Σ w̃ log q(z), the wake-phase of reweighted wake-sleep (Bornschein and Bengio, 2015)."""
    w = normalise(particles.log_weights).detach()
    return (w * particles.proposal.log_density(particles.latents.detach())).sum(-1)


PerImage = Callable[[Particles], Float[Tensor, " batch"]]

P_STEPS: dict[str, PerImage] = {
    "slides": optimal,
    "iwae": iwae,
    "dreg": doubly_reparameterised,
    "wake": wake,
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A row of the table: a bound to climb, or the steps of an EM algorithm; and its options."""

    bound: PerImage
    """The lower bound of log p(x_o) by which validation judges."""
    steps: bool = False
    """Whether M and P are separate steps; else θ and φ climb the bound together."""
    annealed: bool = False
    """Whether the M-step begins with the ELBO's and moves to Q̂."""
    two_pass: bool = False
    """Whether the encoder sees (x_o, x̆_m) rather than (x_o, 0)."""
    imputations: int = 1
    """Fillings of each image's holes that the encoder sees in two passes."""
    first_pass: bool = False
    """Whether q(z | (x_o, 0)) is one more component of that proposal."""
    p_step: str = "slides"
    p_samples: str = "shared"
    """Whether the P-step has the M-step's particles (shared), or draws its own of the new θ."""
    m_step: str = "marginal"
    """Whether the M-step leaves out the missing pixels (marginal), or keeps the term
    log p(x_m | z) of a draw x_m ~ p(x_m | z) (sampled), whose expected gradient is zero."""
    svi: Refinement | None = None
    """Steps by which each image's proposal is refined before the particles are drawn."""
    way_back: float = 0.15
    """The share of the particles that is sent back through the decoder: with K = 50 some seven
    an image, more than have a weight that counts."""

    @property
    def climbs(self) -> tuple[str, ...]:
        """The steps of the optimiser in one step of training.

        Where the refinement is held constant the encoder learns where it begins.
        """
        apart = self.p_samples == "fresh" or (self.svi is not None and not self.svi.through)
        return ("decoder", "encoder") if apart else ("both",)

    @property
    def looks_at_missing(self) -> bool:
        """Whether it needs E log p(x_m | z), which costs half of log p(x_o | z) again."""
        return self.steps and self.p_step == "slides"

    def surrogate(self, particles: Particles, *, alpha: float | Scalar) -> Surrogate:
        """The two scalars, means over the batch; α is the share of Q̂ in the M-step."""
        if not self.steps:
            bound = self.bound(particles).mean()
            return Surrogate(bound, bound)
        share = self.share(alpha)
        m_step = share * expected_log_joint(particles) + (1 - share) * elbo(particles)
        return Surrogate(m_step.mean(), P_STEPS[self.p_step](particles).mean())

    def share(self, alpha: float | Scalar) -> float | Scalar:
        """That of Q̂ in the M-step."""
        return alpha if self.annealed else 1.0

    def proposal(
        self, model: LatentVariableModel, images: Incomplete, noise: Source, *, climb: str = "both"
    ) -> Proposal:
        """Where the particles come from."""
        proposal = (
            model.two_pass(images, noise, imputations=self.imputations, first=self.first_pass)
            if self.two_pass
            else model.zero_filled(images)
        )
        if self.svi is None or (climb == "encoder" and not self.svi.through):
            return proposal
        return self.svi.refined(model, images, proposal, noise.at("svi"))


OBJECTIVES: dict[str, Objective] = {
    "vae": Objective(bound=elbo),
    "vae-analytic": Objective(bound=elbo_analytic),
    "iwae": Objective(bound=iwae),
    "iwem": Objective(bound=iwae, steps=True, annealed=True),
    "iwem-woa": Objective(bound=iwae, steps=True),
    "miss-iwae": Objective(bound=iwae),
    "miss-iwem": Objective(bound=iwae, steps=True, annealed=True, two_pass=True),
    "miss-iwem-woa": Objective(bound=iwae, steps=True, two_pass=True),
}
"""On complete images `miss-iwae` is `iwae`: the encoder sees (x_o, 0) in both."""

P_SAMPLES = ("shared", "fresh")
M_STEPS = ("marginal", "sampled")


@dataclass(frozen=True)
class Climbed:
    """What a step saw of its particles, of each model of a stack."""

    bound: Float[Tensor, "*models"]
    """The mean of the objective's bound over the batch."""
    elbo_variance: Float[Tensor, "*models"]
    """Of the ELBO as an estimate from these particles, the mean over the batch."""
    q_hat_variance: Float[Tensor, "*models"]
    """Of Q̂ likewise, by the delta method."""


def ascend(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    alpha: float | Scalar = 1.0,
    warmth: float | Scalar = 1.0,
    climb: str = "both",
) -> Climbed:
    """Adds the gradients of minus the objective to the model's parameters.

    With a `warmth` below one the latents cost less than log q(z) − log p(z) (Sønderby et al.,
    "Ladder variational autoencoders", 2016).
    `climb` says to whose: decoder is θ, encoder is φ, both is the two from the same particles.
    Both scalars depend on the decoder through log p(x_o | z_k) alone, and linearly up to first
    order, so that one pass back through the decoder serves θ and φ: it is weighted for θ,
    and what arrives at z_k is weighted again for φ.
    Most weights are next to nothing, so only a share of the particles takes that pass: a sample
    by the size of their weights, each of which stands for what it was drawn from. The gradients'
    expectation is that of all particles, and with `way_back=1` so are they themselves.
    """
    proposal = objective.proposal(model, images, noise.at("proposal"), climb=climb)
    latents = proposal.draw(particles, noise.at("particles"))
    drawn = replace(_decoded(objective, model, images, proposal, latents), warmth=warmth)
    models = math.prod(model.stack)
    surrogate = objective.surrogate(drawn, alpha=alpha).times(models)
    for_decoder = _gradient(surrogate.decoder, drawn.log_likelihood)
    for_encoder = _gradient(surrogate.encoder, drawn.log_likelihood)
    for_pass = for_encoder if climb == "encoder" else for_decoder
    sizes = for_pass.abs() + (for_encoder.abs() if climb == "both" else 0.0)
    rows = sizes.view(*model.stack, -1)
    uniform = noise.at("way back").uniform(*model.stack, 1, like=sizes)
    picked = thin(rows, math.ceil(objective.way_back * rows.shape[-1]), uniform).flat(
        sizes.numel()
    )
    at = latents.detach().flatten(0, 1)[picked.index, None].requires_grad_()
    seen, logits = images[picked.index // particles], model.decode(at)
    sampled = objective.steps and objective.m_step == "sampled" and climb != "encoder"
    model.likelihood.log_density(logits, seen).backward(
        _for_rows(-for_pass, picked),
        inputs=[at] if climb == "encoder" else [at, *model.decoder.parameters()],
        retain_graph=sampled,
    )
    if sampled:
        share = objective.share(alpha) * models / len(images)
        for_missing = share * normalise(drawn.log_weights.detach())
        _missing(model, seen, logits, noise.at("missing")).backward(
            _for_rows(-for_missing, picked), inputs=list(model.decoder.parameters())
        )
    if climb != "encoder" and (of_prior := list(model.prior_parameters())):
        for_prior = _gradient(surrogate.decoder, drawn.log_prior)
        model.prior.log_density(latents.detach()).backward(-for_prior, inputs=of_prior)
    if climb != "decoder":
        assert at.grad is not None
        ratio = torch.where(for_pass == 0, 0.0, for_encoder / for_pass)
        arrived = torch.zeros_like(latents).flatten(0, 1)
        arrived.index_add_(0, picked.index, at.grad[:, 0] * ratio.flatten()[picked.index, None])
        torch.autograd.backward(
            [-surrogate.encoder, latents],
            [None, arrived.view_as(latents)],
            inputs=list(model.phi()),
        )
    return _climbed(objective, drawn, model.stack)


@torch.no_grad()
def bound(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
) -> Float[Tensor, " batch"]:
    """The objective's lower bound of each image's log p(x_o): what validation judges by."""
    proposal = objective.proposal(model, images, noise.at("proposal"))
    latents = proposal.draw(particles, noise.at("particles"))
    return objective.bound(_decoded(objective, model, images, proposal, latents)).detach()


def _decoded(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    proposal: Proposal,
    latents: Latents,
) -> Particles:
    """The particles, with log p(x_o | z) as a leaf of its own."""
    likelihood, expected = model.likelihood, None
    with torch.no_grad():
        if objective.looks_at_missing:
            parts = model.by_pieces(likelihood.log_densities, latents, images)
            density, expected = (torch.cat(columns) for columns in zip(*parts, strict=True))
        else:
            density = torch.cat(model.by_pieces(likelihood.log_density, latents, images))
    return Particles(
        latents,
        density.requires_grad_(),
        model.prior.log_density(latents),
        proposal,
        expected_log_missing=expected,
    )


def _gradient(scalar: Scalar, leaf: PerParticle) -> PerParticle:
    if not scalar.requires_grad:  # the wake P-step, where the proposal is held constant
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(
        scalar, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient


def _for_rows(gradient: PerParticle, picked: Thinned) -> Float[Tensor, "rows 1"]:
    return (gradient.flatten()[picked.index] * picked.scale)[:, None]


def _missing(
    model: LatentVariableModel, images: Incomplete, logits: Pixels, noise: Source
) -> PerParticle:
    """The log-probability of missing pixels that are drawn from what it is conditioned on."""
    uniforms = noise.uniform(*logits.shape, like=logits)
    drawn = model.likelihood.sample(logits.detach(), uniforms)[:, 0]
    return model.likelihood.log_density_of(logits, drawn, ~images.observed)


@torch.no_grad()
def _climbed(objective: Objective, particles: Particles, stack: tuple[int, ...]) -> Climbed:
    log_w, log_p = particles.log_weights, particles.log_joint
    w = normalise(log_w)
    q_hat = (w * log_p).sum(-1, keepdim=True)
    bound, elbo, q = (
        per_image.view(*stack, -1).mean(-1)
        for per_image in (
            objective.bound(particles),
            log_w.var(-1, correction=0) / log_w.shape[-1],
            (w * (log_p - q_hat)).square().sum(-1),
        )
    )
    return Climbed(bound, elbo, q)
