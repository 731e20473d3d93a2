"""Stochastic variational inference against fresh particles, closed forms and differences."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise
from model.proposal import Amortised, GaussianMixture
from model.refinement import Refinement
from tests.conftest import copies, fixed_model, small_model, some_incomplete, standard_errors

assert_agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
NOISE = Noise(5)
Propose = Callable[[LatentVariableModel, Incomplete], Amortised]

PROPOSALS: dict[str, tuple[Propose, int]] = {
    "one Gaussian": (LatentVariableModel.zero_filled, 0),
    "a mixture": (lambda model, images: model.two_pass(images, NOISE, imputations=3), 0),
    "two layers": (LatentVariableModel.zero_filled, 3),
    "two layers, a mixture": (
        lambda model, images: model.two_pass(images, NOISE, imputations=3),
        3,
    ),
}
every_proposal = pytest.mark.parametrize(
    ("propose", "upper"), PROPOSALS.values(), ids=PROPOSALS.keys()
)


def _elbos(model: LatentVariableModel, images: Incomplete, proposal: Amortised) -> Tensor:
    """Many fresh estimates of each image's ELBO, from particles that no step has seen."""
    latents = proposal.draw(4000, Noise(77))
    return model.particles(images, proposal, latents).log_weights.T


@every_proposal
def test_the_steps_raise_the_elbo_of_every_image(propose: Propose, upper: int):
    """Each image's ELBO, by fresh particles, is higher after some steps, and then after more."""
    model, images = small_model(upper=upper).requires_grad_(requires_grad=False), some_incomplete()
    proposal = propose(model, images)
    elbos = [
        _elbos(
            model,
            images,
            Refinement(steps=steps, particles=64).refined(model, images, proposal, NOISE),
        )
        for steps in (0, 4, 16)
    ]

    assert (standard_errors(elbos[1] - elbos[0], 0.0) > 5).all()
    assert (standard_errors(elbos[2] - elbos[0], 0.0) > 5).all()
    assert elbos[2].mean() > elbos[1].mean()


def test_where_nothing_is_seen_the_steps_lead_to_the_prior():
    """The ELBO is then −KL(q ‖ p), and its summit N(0, I) however far away the steps begin."""
    model, images = fixed_model(), copies(some_incomplete(1), 50)
    blind = Incomplete.hide(images.values, torch.zeros_like(images.observed))
    far = torch.tensor([[[3.0, -2.0]]], dtype=torch.float64).repeat(50, 1, 1)
    refined = Refinement(steps=80, particles=16).refined(
        model, blind, GaussianMixture(far, 0.5 * far), NOISE
    )

    assert refined.lower.mean.abs().mean() < 0.1
    assert refined.lower.log_std.abs().mean() < 0.1


def test_a_step_is_along_the_natural_gradient():
    """On average over the noise a step is rate·σ²·∂ELBO/∂μ and rate/2·∂ELBO/∂log σ.

    Where nothing is seen those are −μ and 1/σ − σ over σ, in closed form.
    """
    model, images = fixed_model(), copies(some_incomplete(1), 20_000)
    blind = Incomplete.hide(images.values, torch.zeros_like(images.observed))
    mean = torch.tensor([[[0.7, -1.2]]], dtype=torch.float64).repeat(20_000, 1, 1)
    log_std = torch.tensor([[[-0.4, 0.3]]], dtype=torch.float64).repeat(20_000, 1, 1)
    refined = Refinement(steps=1, rate=0.2, particles=2).refined(
        model, blind, GaussianMixture(mean, log_std), NOISE
    )
    variance = (2 * log_std).exp()

    moved = (refined.lower.mean - mean)[:, 0], (refined.lower.log_std - log_std)[:, 0]
    assert standard_errors(moved[0], (0.2 * variance * -mean)[0, 0]).abs().max() < 4.5
    assert standard_errors(moved[1], (0.1 * (1 - variance))[0, 0]).abs().max() < 4.5


@every_proposal
@pytest.mark.parametrize("through", [False, True])
def test_no_steps_leave_the_proposal_as_it_is(propose: Propose, upper: int, through: bool):  # noqa: FBT001
    """After no step the parameters, the draws and the density are the proposal's, to the bit."""
    model, images = small_model(upper=upper), some_incomplete()
    proposal = propose(model, images)
    refined = Refinement(steps=0, through=through).refined(model, images, proposal, NOISE)

    latents = proposal.draw(5, NOISE)
    assert type(refined) is type(proposal)
    assert torch.equal(refined.lower.mean, proposal.lower.mean)
    assert torch.equal(refined.lower.log_std, proposal.lower.log_std)
    assert torch.equal(refined.draw(5, NOISE), latents)
    assert torch.equal(refined.log_density(latents), proposal.log_density(latents))


@every_proposal
def test_stopped_steps_carry_no_gradient(propose: Propose, upper: int):
    """Where they are not gone back through, the steps end in constants, the same as through."""
    model, images = small_model(upper=upper), some_incomplete()
    stopped, through = (
        Refinement(steps=3, through=through)
        .refined(model, images, propose(model, images), NOISE)
        .lower
        for through in (False, True)
    )

    assert not stopped.mean.requires_grad
    assert not stopped.log_std.requires_grad
    assert through.mean.requires_grad
    assert_agree(
        [stopped.mean, stopped.log_std], [through.mean.detach(), through.log_std.detach()]
    )
    assert all(parameter.grad is None for parameter in model.parameters())


@every_proposal
def test_gradients_go_back_through_the_steps(propose: Propose, upper: int):
    """∂/∂φ of where the steps end is what central differences of φ say, in any direction."""
    model, images, step = small_model(upper=upper), some_incomplete(3), 1e-5
    phi = list(model.phi())
    refinement = Refinement(steps=3, rate=0.02, through=True)

    def end() -> Tensor:
        refined = refinement.refined(model, images, propose(model, images), NOISE).lower
        return (refined.mean.sin() + refined.mean * refined.log_std).sum()

    gradients = torch.autograd.grad(end(), phi)
    for index, (parameter, gradient) in enumerate(zip(phi, gradients, strict=True)):
        direction = NOISE.at("direction", index).normal(*parameter.shape, like=parameter)
        ends = list[float]()
        for sign in (1, -2, 1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
            ends.append(end().item())
        slope = (ends[0] - ends[1]) / (2 * step)

        assert abs(slope) > 1e-4
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_images_are_refined_each_by_itself():
    """What an image's neighbours are changes no step of its own."""
    model, images = fixed_model(), some_incomplete(2)
    alike = copies(images[torch.tensor([0])], 2)
    first, second = (
        Refinement(steps=3).refined(model, batch, model.zero_filled(batch), NOISE).lower
        for batch in (images, alike)
    )

    assert_agree(first.mean[0], second.mean[0])
    assert (first.mean[1] - second.mean[1]).abs().min() > 1e-6
