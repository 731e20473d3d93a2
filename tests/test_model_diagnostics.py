"""Diagnostics against what is known: closed forms, quadrature and made-up predictions."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.stats import chisquare

from model.diagnostics import (
    ELBO_PARTICLES,
    anomaly,
    calibration,
    gaps,
    latent_use,
    ranks,
    uniformity,
)
from model.estimators import QUALITIES
from model.likelihood import score
from model.masks import Incomplete
from model.networks import LinearDecoder
from model.noise import Noise, NoisePerImage
from model.proposal import Stacked
from model.stages import finish
from tests.conftest import Quadrature, fixed_model, small_model, some_incomplete
from tests.test_model_factor_analysis import exact, holes, linear_model

LIKE = torch.zeros((), dtype=torch.float64)


def test_a_latent_that_no_pixel_depends_on_is_not_used():
    """Its mean does not vary and its posterior is the prior; the others are active."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    assert isinstance(model.decoder, LinearDecoder)
    with torch.no_grad():
        model.decoder.layer.weight[:, 2] = 0
    images = Incomplete.complete(model.sample(200, Noise(1)))
    use = latent_use(model, images, Noise(0))
    posterior = exact(model).posterior(images)
    covariance = posterior.factor[:, 0] @ posterior.factor[:, 0].mT
    each = torch.distributions.Normal(
        posterior.mean[:, 0], covariance.diagonal(dim1=1, dim2=2).sqrt()
    )
    divergence = torch.distributions.kl_divergence(each, torch.distributions.Normal(LIKE, 1.0))

    assert use.variance[2] < 1e-12
    assert use.active == 4
    torch.testing.assert_close(use.divergence, divergence.mean(0))


def test_an_encoders_use_is_that_of_its_gaussians():
    """The divergences add up to the closed form of the whole."""
    images = some_incomplete(20)
    model, noise = fixed_model(), NoisePerImage.of(0, range(20))
    use = latent_use(model, images, noise)
    whole = model.two_pass(images, noise, imputations=1).divergence().mean()

    torch.testing.assert_close(use.divergence.sum(), whole)


def test_the_use_of_two_layers_adds_up_to_the_whole():
    """The parts of both layers' latents are together E_q[log q(z | x) - log p(z)]."""
    images = some_incomplete(20)
    model = small_model(upper=3).requires_grad_(requires_grad=False)
    noise = NoisePerImage.of(0, range(20))
    use = latent_use(model, images, noise)
    proposal = model.two_pass(images, noise, imputations=1)
    latents = proposal.draw(20_000, noise.at("many"))
    ratio = proposal.log_density(latents) - model.prior.log_density(latents)

    assert use.variance.shape == use.divergence.shape == (2 + 3,)
    error = ratio.std(-1).square().sum().sqrt() / len(images) / ELBO_PARTICLES**0.5
    assert (use.divergence.sum() - ratio.mean()).abs() < 4 * error
    assert (use.divergence[2:] > 0).all()


def test_an_upper_latent_that_says_nothing_is_not_used():
    """Where the layer above is its prior whatever is below, its parts are zero."""
    images = some_incomplete(20)
    model = small_model(upper=3).requires_grad_(requires_grad=False)
    proposal = model.two_pass(images, NoisePerImage.of(0, range(20)), imputations=1)
    assert isinstance(proposal, Stacked)
    for parameter in proposal.network.parameters():
        parameter.zero_()
    use = latent_use(model, images, NoisePerImage.of(0, range(20)))

    assert use.active <= 2
    assert (use.variance[2:] == 0).all()
    torch.testing.assert_close(use.divergence[2:], torch.zeros(3, dtype=torch.float64))


def test_the_gaps_are_what_the_elbo_loses():
    """Together they are log p(x_o), by quadrature, less the ELBO; each is a loss on average."""
    model, images = fixed_model(), some_incomplete(12)
    noise = NoisePerImage.of(0, range(12))
    with torch.inference_mode():
        found = finish(gaps(model, images, noise, quality=QUALITIES["standard"], particles=4000))
    own = model.two_pass(images, noise.at("own"), imputations=1)
    log_w = model.particles(images, own, own.draw(20_000, noise.at("many"))).log_weights
    lost = Quadrature.of(model).log_likelihood(images) - log_w.mean(-1)

    assert found.amortisation.mean() > 0.01
    assert found.approximation.mean() > 0
    error = log_w.std(-1) / ELBO_PARTICLES**0.5
    assert ((found.amortisation + found.approximation - lost) / error).abs().max() < 4.5


def test_probabilities_that_come_true_are_calibrated():
    """Their error is only of chance; one off by 0.1 is seen, and sure pixels do not count."""
    p = Noise(0).at("p").uniform(200_000, like=LIKE)
    truth = (Noise(0).at("x").uniform(200_000, like=LIKE) < p).double()
    found = calibration(p, truth)

    assert found.error < 0.01
    assert found.count.sum() == ((p >= 0.05) & (p < 0.95)).sum()
    torch.testing.assert_close(
        found.predicted, torch.linspace(0.075, 0.925, 18).double(), atol=2e-3, rtol=0
    )
    assert calibration((p - 0.1).clamp(min=0), truth).error == pytest.approx(0.1, abs=0.01)


def test_nothing_unsure_has_no_error():
    """Where every pixel is certain there is nothing to be calibrated."""
    assert calibration(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).error == 0


def test_the_rank_counts_draws_with_less_ink():
    """Draws with as much are below by chance, as often as not."""
    draws = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 4, 1, 1, 1).expand(2000, -1, -1, -1, -1)
    truth = torch.full((2000, 1, 1, 1), 2.0)
    found = ranks(draws, truth, Noise(0))

    assert set(found.tolist()) == {2, 3}
    assert (found == 2).double().mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("counts", [[10, 12, 9, 11], [0, 50, 3, 1], [7, 7]])
def test_uniformity_is_pearsons_test(counts: list[int]):
    """The p-value is SciPy's."""
    assert uniformity(counts) == pytest.approx(chisquare(counts).pvalue, rel=1e-9)


def test_a_percentile_is_among_images_under_the_same_mask():
    """Of factor analysis, by the exact densities; what is far away is below all."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images, held_out = holes(model, 6), model.sample(40, Noise(3))
    values = images.values.clone()
    values[5] += 9.0
    images = Incomplete.hide(values, images.observed)
    found = finish(
        anomaly(model, images, held_out, Noise(0), quality=QUALITIES["standard"], particles=64)
    )

    for index, share in enumerate(found):
        seen = images.observed[index].expand(held_out.shape)
        others = exact(model).log_likelihood(Incomplete.hide(held_out, seen))
        own = exact(model).log_likelihood(images[index : index + 1])
        assert share == (others < own).double().mean()
    assert found[5] == 0


def test_several_threads_may_look_at_once():
    """Modes are found by several threads at a time as by one, to the same bits."""
    model, images = fixed_model(), some_incomplete(16)

    def look(index: int) -> float:
        noise = NoisePerImage.of(0, [index])
        stages = score(model, images[index : index + 1], noise, particles=64)
        return finish(stages).log_likelihood.value.item()

    alone = [look(index) for index in range(16)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, range(16))) == alone
