"""Annealed chains against the exact posterior of factor analysis."""

import math

import pytest
import torch

from model.annealing import Chains, annealed
from model.noise import NoisePerImage
from model.proposal import CorrelatedMixture
from model.stages import finish
from model.weights import normalise
from tests.test_model_factor_analysis import exact, holes, linear_model


def _chains(*, away: float, wide: float, temperatures: int, chains: int) -> Chains:
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 4)
    posterior = exact(model).posterior(images)
    start = CorrelatedMixture(posterior.mean + away, wide * posterior.factor)
    noise = NoisePerImage.of(0, range(4))
    return finish(annealed(model, images, start, noise, temperatures=temperatures, chains=chains))


def test_from_the_posterior_every_chain_has_the_same_weight():
    """Where q is p(z | x_o) there is nothing to anneal: each weight is p(x_o)."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    found = _chains(away=0.0, wide=1.0, temperatures=10, chains=8)

    truth = exact(model).log_likelihood(holes(model, 4))[:, None].expand(-1, 8)
    torch.testing.assert_close(found.log_weights, truth, rtol=0, atol=1e-9)
    assert (found.acceptance > 0.9).all()


def test_the_last_states_are_the_posterior():
    """Weighted, they have its mean and covariance, from a start that is far from it."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 4)
    found = _chains(away=1.0, wide=1.5, temperatures=40, chains=2000)
    posterior = exact(model).posterior(images)
    w = normalise(found.log_weights)[..., None]
    covariance = posterior.factor[:, 0] @ posterior.factor[:, 0].mT
    away = found.latents[:, 0] - posterior.mean
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()

    assert ((w * away).sum(1) / deviation).abs().max() < 0.1
    moments = away.mT @ (w * away)
    scale = deviation[:, :, None] * deviation[:, None]
    assert ((moments - covariance) / scale).abs().max() < 0.15


def test_an_images_chains_do_not_depend_on_its_neighbours():
    """With noise of its own each image gets the same numbers alone."""
    model = linear_model()
    images = holes(model, 3)
    start = exact(model).posterior(images)
    together = finish(
        annealed(model, images, start, NoisePerImage.of(5, range(3)), temperatures=5, chains=4)
    )
    alone = finish(
        annealed(
            model,
            images[2:],
            CorrelatedMixture(start.mean[2:] + 0, start.factor[2:]),
            NoisePerImage.of(5, [2]),
            temperatures=5,
            chains=4,
        )
    )

    torch.testing.assert_close(alone.log_weights, together.log_weights[2:], rtol=0, atol=1e-10)


def test_chains_that_stay_at_their_modes_count_all_modes():
    """From three Gaussians at one place and one far away each weight is p(x_o) still."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 4)
    posterior = exact(model).posterior(images)
    mean = posterior.mean.repeat(1, 4, 1)
    mean[:, 3] += 9.0
    start = CorrelatedMixture(mean, posterior.factor.repeat(1, 4, 1, 1))
    noise = NoisePerImage.of(0, range(4))
    found = finish(annealed(model, images, start, noise, temperatures=40, chains=32))

    truth = exact(model).log_likelihood(images)
    torch.testing.assert_close(found.log_weights.exp().mean(-1).log(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("widths", "apart"), [((0.4, 2.0), 0.0), ((1.1, 1.8), 0.5)])
def test_the_mean_weight_is_unbiased_from_gaussians_that_differ(
    widths: tuple[float, float], apart: float
):
    """Each chain moves as its own Gaussian is wide, and their weights' mean is p(x_o) still."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 3)[2:]
    posterior = exact(model).posterior(images)
    mean = torch.cat([posterior.mean - apart, posterior.mean + apart], 1)
    start = CorrelatedMixture(mean, torch.cat([width * posterior.factor for width in widths], 1))
    noise = NoisePerImage.of(0, [0])
    found = finish(annealed(model, images, start, noise, temperatures=5, chains=40_000))

    w = (found.log_weights[0] - exact(model).log_likelihood(images)).exp()
    error = math.sqrt(sum(part.var().item() / len(part) for part in (w[::2], w[1::2])) / 4)
    assert error < 0.02
    assert abs(w.mean().item() - 1) < 4 * error


def test_the_chains_are_shared_evenly():
    """A start of three Gaussians cannot have eight chains."""
    model = linear_model()
    posterior = exact(model).posterior(holes(model, 2))
    start = CorrelatedMixture(posterior.mean.repeat(1, 3, 1), posterior.factor.repeat(1, 3, 1, 1))
    stages = annealed(
        model, holes(model, 2), start, NoisePerImage.of(0, range(2)), temperatures=5, chains=8
    )

    with pytest.raises(ValueError, match="a multiple of 3 chains; got 8"):
        finish(stages)
