"""Laplace's mixture against the posterior where that is Gaussian, and against autograd."""

import pytest
import torch

from model.laplace import WIDER, laplace
from model.likelihood import encode, modes
from model.masks import Incomplete
from model.noise import Noise
from model.proposal import Latents
from model.stages import finish
from tests.conftest import fixed_model, small_model, some_incomplete
from tests.test_model_factor_analysis import exact, holes, linear_model

LIKE = torch.zeros((), dtype=torch.float64)


def test_of_a_linear_model_it_is_the_posterior():
    """One step from anywhere is at the mode, and the curvature is that of p(z | x_o)."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 6)
    starts = 3 * Noise(1).normal(6, 2, 5, like=LIKE)
    found = finish(laplace(model, images, starts, steps=1))
    posterior = exact(model).posterior(images)

    torch.testing.assert_close(found.mean, posterior.mean.expand(-1, 2, -1), rtol=0, atol=1e-9)
    wider = torch.where(images.observed.flatten(1).any(1), WIDER, 1.0)[:, None, None, None]
    expected = wider * posterior.factor.expand(-1, 2, -1, -1)
    torch.testing.assert_close(found.factor, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("upper", [0, 2])
def test_it_ends_where_the_slope_is_zero(upper: int):
    """After many steps the gradient of log p(x_o, z) in standard latents vanishes."""
    model = small_model(upper=upper).requires_grad_(requires_grad=False)
    images, starts = some_incomplete(), Noise(1).normal(6, 3, 2 + upper, like=LIKE)
    found = finish(laplace(model, images, starts, steps=60)).mean.requires_grad_()
    decoded = model.decode(model.prior.from_standard(found))
    height = model.likelihood.log_density(decoded, images) - 0.5 * found.square().sum(-1)

    (slope,) = torch.autograd.grad(height.sum(), [found])
    assert slope.abs().max() < 1e-6


def test_no_step_goes_down():
    """However far away it begins, each further step is at least as high."""
    model, images = fixed_model(gain=5.0), some_incomplete()
    starts = 6 * Noise(2).normal(6, 4, 2, like=LIKE)
    heights = torch.stack(
        [
            _height(images, finish(laplace(model, images, starts, steps=steps)).mean)
            for steps in range(8)
        ]
    )

    assert heights.diff(dim=0).min() >= -1e-12
    assert heights[-1].mean() > heights[0].mean() + 5


def _height(images: Incomplete, z: Latents) -> torch.Tensor:
    model = fixed_model(gain=5.0)
    return model.particles(images, model.zero_filled(images), z).log_joint


def test_where_nothing_was_observed_it_is_the_prior():
    """The mode is at zero, the curvature is one, and no component is any wider."""
    model, images = fixed_model(), some_incomplete()
    blank = Incomplete.hide(images.values, torch.zeros_like(images.observed))
    found = finish(modes(model, blank, encode(model, blank, Noise(0)), Noise(0)))

    torch.testing.assert_close(found.mean, torch.zeros_like(found.mean), rtol=0, atol=1e-12)
    expected = torch.eye(2, dtype=torch.float64).expand_as(found.factor)
    torch.testing.assert_close(found.factor, expected, rtol=0, atol=1e-12)
