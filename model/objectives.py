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

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from model.latent import LatentVariableModel, Particles, Proposal
from model.masks import Incomplete
from model.noise import Source
from model.weights import log_mean_exp, normalise

__all__ = ["OBJECTIVES", "P_STEPS", "Objective", "Surrogate", "ascend"]

Scalar = Float[Tensor, ""]


@dataclass(frozen=True)
class Surrogate:
    """Two scalars: the θ-gradient of one and the φ-gradient of the other are the estimators."""

    decoder: Scalar
    encoder: Scalar


def elbo(particles: Particles) -> Float[Tensor, " batch"]:
    """E_q[log p(x_o, z) − log q(z)], by the mean over the particles."""
    return particles.log_weights.mean(-1)


def elbo_analytic(particles: Particles) -> Float[Tensor, " batch"]:
    """E_q[log p(x_o | z)] − KL(q ‖ p) with the divergence in closed form."""
    return particles.log_likelihood.mean(-1) - particles.proposal.divergence()


def iwae(particles: Particles) -> Float[Tensor, " batch"]:
    """The logarithm of (1/K) Σ w (Burda, Grosse and Salakhutdinov, 2016)."""
    return log_mean_exp(particles.log_weights)


def expected_log_joint(particles: Particles) -> Float[Tensor, " batch"]:
    """Q̂(θ), the E-step by self-normalised importance sampling."""
    return (normalise(particles.log_weights).detach() * particles.log_joint).sum(-1)


def optimal(particles: Particles) -> Float[Tensor, " batch"]:
    """L̂_opt, the P-step towards the proposal |log p(x, z)|·p(x, z) (Owen, 2013)."""
    log_p = particles.log_joint + particles.expected_log_missing.detach()
    return log_mean_exp(log_p.abs().log() + particles.log_weights)


def doubly_reparameterised(particles: Particles) -> Float[Tensor, " batch"]:
    """The DReG estimator of IWAE's φ-gradient, Σ w̃² ∇_z log w (Tucker et al., 2018).

    It is unbiased for independent particles. Those of a mixture use its components evenly and
    so depend on each other: with several imputations it is off by a little.
    """
    w = normalise(particles.log_weights).detach()
    log_w = particles.log_joint - particles.proposal.detach().log_density(particles.latents)
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
    """A row of the table: a bound to climb, or the steps of an EM algorithm."""

    bound: PerImage
    """The lower bound of log p(x_o) by which validation judges."""
    steps: bool = False
    """Whether M and P are separate steps; else θ and φ climb the bound together."""
    annealed: bool = False
    """Whether the M-step begins with the ELBO's and moves to Q̂."""
    two_pass: bool = False
    """Whether the encoder sees (x_o, x̆_m) rather than (x_o, 0)."""
    p_step: str = "slides"

    def surrogate(self, particles: Particles, *, alpha: float) -> Surrogate:
        """The two scalars, means over the batch; α is the share of Q̂ in the M-step."""
        if not self.steps:
            bound = self.bound(particles).mean()
            return Surrogate(bound, bound)
        share = alpha if self.annealed else 1.0
        m_step = share * expected_log_joint(particles) + (1 - share) * elbo(particles)
        return Surrogate(m_step.mean(), P_STEPS[self.p_step](particles).mean())

    def proposal(
        self, model: LatentVariableModel, images: Incomplete, noise: Source, *, imputations: int
    ) -> Proposal:
        """Where the particles come from."""
        if not self.two_pass:
            return model.zero_filled(images)
        return model.two_pass(images, noise, imputations=imputations)


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


def ascend(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int,
    imputations: int = 1,
    alpha: float = 1.0,
) -> Scalar:
    """Adds the gradients of minus the objective to the model's parameters; returns its bound.

    Both scalars depend on the decoder through log p(x_o | z_k) alone, and linearly up to first
    order, so that one pass back through the decoder serves θ and φ: it is weighted for θ,
    and what arrives at z_k is weighted again for φ.
    """
    proposal = objective.proposal(model, images, noise.at("proposal"), imputations=imputations)
    latents = proposal.draw(particles, noise.at("particles"))
    at = latents.detach().requires_grad_()
    drawn = model.particles(images, proposal, at)
    leaf = drawn.log_likelihood.detach().requires_grad_()
    small = replace(
        drawn,
        latents=latents,
        log_likelihood=leaf,
        log_prior=model.prior.log_density(latents),
    )
    surrogate = objective.surrogate(small, alpha=alpha)
    (for_decoder,) = torch.autograd.grad(surrogate.decoder, leaf, retain_graph=True)
    (for_encoder,) = torch.autograd.grad(
        surrogate.encoder, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    drawn.log_likelihood.backward(-for_decoder)
    ratio = torch.where(for_decoder == 0, 0.0, for_encoder / for_decoder)
    assert at.grad is not None
    torch.autograd.backward([-surrogate.encoder, latents], [None, at.grad * ratio[..., None]])
    return objective.bound(small).detach().mean()
