"""Adaptive importance sampling learns what its first proposal lacked."""

import torch

from model.adaptation import DEFENSIVE, adaptive
from model.likelihood import score
from model.masks import Incomplete
from model.noise import Noise
from model.proposal import CorrelatedMixture
from model.stages import finish
from model.weights import effective_sample_size
from tests.conftest import fixed_model, some_incomplete
from tests.test_model_factor_analysis import exact, holes, linear_model


def test_it_finds_a_posterior_that_its_beginning_misses():
    """From a proposal that is off by two deviations most particles come to count."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 50)
    posterior = exact(model).posterior(images)
    off = posterior.factor.sum(-1) * 2 / 5**0.5
    begun = CorrelatedMixture(posterior.mean + off, posterior.factor)
    learned = finish(adaptive(model, images, begun, Noise(0)))

    sizes = [
        effective_sample_size(
            model.particles(images, q, q.draw(500, Noise(1))).log_weights
        ).median()
        for q in (begun, learned)
    ]
    assert sizes[0] < 100
    assert sizes[1] > 250


def test_the_prior_keeps_its_share():
    """The density is nowhere below the defensive share of the prior's: no weight is unbounded."""
    model, images = fixed_model(), some_incomplete()
    narrow = CorrelatedMixture(
        torch.full((6, 1, 2), 3.0).double(), 1e-3 * torch.eye(2).double().expand(6, 1, 2, 2)
    )
    learned = finish(adaptive(model, images, narrow, Noise(0)))
    z = 3 * Noise(2).normal(6, 100, 2, like=images.values)

    below = model.prior.log_density(z) + torch.tensor(DEFENSIVE).log()
    assert (learned.log_density(z) >= below - 1e-9).all()
    found = finish(score(model, images, Noise(3), particles=512, proposal=learned))
    assert found.log_likelihood.value.isfinite().all()


def test_nothing_observed_and_nothing_missing():
    """Both ends of what an image may lack have finite proposals."""
    model, images = fixed_model(), some_incomplete(2)
    seen = torch.tensor([True, False])[:, None, None, None].expand_as(images.observed)
    ends = Incomplete.hide(images.values, seen)
    learned = finish(adaptive(model, ends, model.zero_filled(ends), Noise(0)))

    assert learned.log_density(learned.draw(64, Noise(1))).isfinite().all()
