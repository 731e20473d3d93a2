"""Factor analysis against torch's Gaussians, and EM against the closed form of PCA."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from model.factor_analysis import SMALLEST_VARIANCE, FactorAnalysis, fit
from model.imputation import impute
from model.latent import Architecture, LatentVariableModel
from model.likelihood import score
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage
from model.pixels import GaussianPixels
from model.proposal import CorrelatedMixture
from model.stages import finish
from tests.conftest import standard_errors

SHAPE, LATENT = (1, 2, 3), 2
LIKE = torch.zeros((), dtype=torch.float64)


def linear_model(
    *, shape: tuple[int, int, int] = SHAPE, latent: int = LATENT, seed: int = 0
) -> LatentVariableModel:
    """Factor analysis as a model of the family, in float64, with loadings that matter."""
    architecture = Architecture(
        image_shape=shape,
        latent=latent,
        encoder="exact",
        decoder="linear",
        likelihood="gaussian",
    )
    model = architecture.build(Noise(seed)).double().requires_grad_(requires_grad=False)
    for name, parameter in model.named_parameters():
        parameter.copy_(0.7 * Noise(seed).at(name).normal(*parameter.shape, like=parameter))
    return model


def exact(model: LatentVariableModel) -> FactorAnalysis:
    """Its closed forms."""
    assert model.exact is not None
    return model.exact


def holes(model: LatentVariableModel, count: int, *, seed: int = 1) -> Incomplete:
    """Images of the model's of which about half is missing: of one nothing, of one everything."""
    values = model.sample(count, Noise(seed))
    seen = Noise(seed).at("mask").uniform(*values.shape, like=values) < 0.5
    seen[0], seen[1] = True, False
    return Incomplete.hide(values, seen)


def _joint(model: FactorAnalysis) -> MultivariateNormal:
    covariance = model.loadings @ model.loadings.T + model.variance.diag()
    return MultivariateNormal(model.offset, covariance)


def test_the_likelihood_is_that_of_the_observed_pixels_gaussian():
    """Log p(x_o) is the density of the joint Gaussian's rows and columns that were seen."""
    model = linear_model()
    joint, images = _joint(exact(model)), holes(model, 8)
    found = exact(model).log_likelihood(images)

    for index in range(len(images)):
        at = images.observed[index].flatten()
        covariance = joint.covariance_matrix[at][:, at]
        values = images.values[index].flatten()[at]
        expected = (
            MultivariateNormal(joint.loc[at], covariance).log_prob(values) if at.any() else 0.0
        )
        assert found[index].item() == pytest.approx(float(expected), abs=1e-10)


def test_the_conditional_is_the_schur_complement():
    """E and Cov of what is missing given what was seen; what was seen is itself."""
    model = linear_model()
    joint, images = _joint(exact(model)), holes(model, 8)
    means, covariances = exact(model).conditional(images)

    for index in range(len(images)):
        at = images.observed[index].flatten()
        all_of = joint.covariance_matrix
        gain = all_of[~at][:, at] @ torch.linalg.inv(all_of[at][:, at])
        values = images.values[index].flatten()
        mean = joint.loc[~at] + gain @ (values[at] - joint.loc[at])
        covariance = all_of[~at][:, ~at] - gain @ all_of[at][:, ~at]
        torch.testing.assert_close(means[index][~at], mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(covariances[index][~at][:, ~at], covariance, rtol=0, atol=1e-10)
        assert torch.equal(means[index][at], values[at])
        assert (covariances[index][at] == 0).all()
        assert (covariances[index][:, at] == 0).all()


def test_every_particle_of_the_posterior_has_the_same_weight():
    """With the posterior as its proposal each weight is p(x_o), and the error is zero."""
    model = linear_model()
    images = holes(model, 8)
    noise = NoisePerImage.of(0, range(len(images)))
    found = finish(score(model, images, noise, particles=70)).log_likelihood

    expected = exact(model).log_likelihood(images)
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.standard_error, torch.zeros(8).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.effective_sample_size, torch.full_like(found.value, 70.0))


def test_the_conditional_of_the_known_pixels_is_exact():
    """It is log p(x_k) - log p(x_o), whatever stands where the truth is not known."""
    model = linear_model()
    images, other = holes(model, 8), holes(model, 8, seed=2)
    truth = images.fill(torch.where(other.observed, other.values, torch.nan))
    noise = NoisePerImage.of(0, range(len(images)))
    stages = score(model, images, noise, particles=70, truth=truth, known=other.observed)
    found = finish(stages).conditional

    whole = Incomplete.hide(truth, images.observed | other.observed)
    expected = exact(model).log_likelihood(whole) - exact(model).log_likelihood(images)
    assert found is not None
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-10)


def test_completions_have_the_exact_mean_and_covariance():
    """The imputed mean and deviation are the conditional's, and the draws have its moments."""
    model = linear_model()
    images = holes(model, 3)
    noise = NoisePerImage.of(0, range(len(images)))
    found = finish(impute(model, images, noise, particles=40_000, draws=8000))
    mean, covariance = exact(model).conditional(images)
    draws = found.draws.flatten(2)

    variance = covariance.diagonal(dim1=1, dim2=2)
    assert ((found.mean.flatten(1) - mean).abs() < 5 * (variance / 40_000).sqrt() + 1e-12).all()
    torch.testing.assert_close(found.std.flatten(1), variance.sqrt(), rtol=0.03, atol=1e-12)
    for index in (1, 2):
        at = ~images.observed[index].flatten()
        away = draws[index][:, at] - mean[index][at]
        assert standard_errors(away, 0.0).abs().max() < 4
        products = away[:, :, None] * away[:, None]
        assert standard_errors(products, covariance[index][at][:, at]).abs().max() < 4.5


def _sampled(count: int, *, missing: float, seed: int = 3) -> Incomplete:
    values = linear_model().sample(count, Noise(seed))
    seen = Noise(seed).at("seen").uniform(*values.shape, like=values) >= missing
    return Incomplete.hide(values, seen)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_the_likelihood_never_falls(missing: float, *, isotropic: bool):
    """Every iteration of EM gives a mean log p(x_o) that is no lower, for any holes.

    The pixels are as unlike as those of digits, of which some all but never change.
    """
    images = _sampled(300, missing=missing)
    images = Incomplete(images.values * torch.logspace(-3, 0, 6).view(1, 1, 2, 3), images.observed)
    _, history = fit(
        [images[:100], images[100:]], LATENT, iterations=40, isotropic=isotropic, noise=Noise(0)
    )

    assert len(history) == 41
    assert torch.tensor(history).diff().min() > -1e-10
    assert history[-1] - history[0] > 0.1


def test_on_complete_images_em_finds_the_principal_components():
    """With one noise for all pixels it is the closed form of Tipping and Bishop (1999)."""
    images = _sampled(400, missing=0.0)
    found, _ = fit([images], LATENT, iterations=3000, isotropic=True, noise=Noise(0))
    x = images.values.flatten(1)
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    noise = values[:-LATENT].mean()
    top = vectors[:, -LATENT:]
    covariance = top @ (values[-LATENT:] - noise).diag() @ top.T

    torch.testing.assert_close(found.offset, x.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.variance, noise.expand(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loadings @ found.loadings.T, covariance, rtol=0, atol=1e-5)


def test_from_images_with_holes_em_finds_the_truth():
    """With half of the pixels missing it fits as well as the model that made them."""
    images, fresh = _sampled(4000, missing=0.5), _sampled(4000, missing=0.5, seed=4)
    found, history = fit([images], LATENT, iterations=300, noise=Noise(0))
    truth = exact(linear_model())

    assert history[-1] >= truth.log_likelihood(images).mean()
    lost = truth.log_likelihood(fresh) - found.log_likelihood(fresh)
    assert abs(lost.mean().item()) < 0.02


def test_a_pixel_that_was_never_seen_or_never_changes():
    """The first keeps its beginning and the second a least variance; all stays finite.

    With one noise for all pixels that is also the first's.
    """
    images = _sampled(50, missing=0.3)
    observed = images.observed.clone()
    observed[:, 0, 0, 0], observed[:, 0, 0, 1] = False, True
    values = images.values.clone()
    values[:, 0, 0, 1] = 0.25
    found, history = fit([Incomplete.hide(values, observed)], 1, iterations=20, noise=Noise(0))

    assert all(map(math.isfinite, history))
    assert found.offset[0] == 0
    assert found.variance[0] == SMALLEST_VARIANCE
    assert found.variance[1] == pytest.approx(SMALLEST_VARIANCE)
    assert found.offset[1] == pytest.approx(0.25, abs=1e-6)
    one, _ = fit(
        [Incomplete.hide(values, observed)], 1, iterations=5, isotropic=True, noise=Noise(0)
    )
    assert one.variance.unique().numel() == 1


@pytest.mark.parametrize(
    "batches", [[], [Incomplete.hide(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1).bool())]]
)
def test_nothing_observed_is_refused(batches: list[Incomplete]):
    """There is nothing to fit."""
    with pytest.raises(ValueError, match="Expected images with observed pixels; got none"):
        fit(batches, 1, iterations=1, noise=Noise(0))


@pytest.mark.parametrize(
    "change", [{"decoder": "mlp"}, {"likelihood": "bernoulli"}, {"upper": 2}], ids=str
)
def test_only_a_linear_model_is_exact(change: dict[str, object]):
    """Other parts have no closed form, and the error says what there was."""
    parts = {"encoder": "exact", "decoder": "linear", "likelihood": "gaussian", **change}

    with pytest.raises(ValueError, match="Expected a linear decoder, gaussian pixels and one"):
        Architecture(**parts).build(Noise(0))  # pyright: ignore[reportArgumentType]


# Its distributions.


def _mixture(components: int, batch: int = 2) -> CorrelatedMixture:
    shape = (batch, components, 3)
    mean = Noise(1).at("mean").normal(*shape, like=LIKE)
    root = Noise(1).at("root").normal(*shape, 3, like=LIKE)
    return CorrelatedMixture(mean, torch.linalg.cholesky(root @ root.mT + 0.1 * torch.eye(3)))


def _torch(mixture: CorrelatedMixture) -> MultivariateNormal:
    return MultivariateNormal(mixture.mean, scale_tril=mixture.factor)


@pytest.mark.parametrize("components", [1, 4])
def test_the_density_of_a_correlated_mixture(components: int):
    """It is the mean of torch's densities of the components."""
    mixture = _mixture(components)
    z = Noise(2).normal(2, 9, 3, like=LIKE)
    each = _torch(mixture).log_prob(z[:, :, None].movedim(1, 0)).movedim(0, 1)
    expected = each.logsumexp(-1) - math.log(components)

    torch.testing.assert_close(mixture.log_density(z), expected, rtol=0, atol=1e-10)


def test_draws_of_a_correlated_mixture_are_from_it():
    """They use the components evenly, and one component's have its mean and covariance."""
    mixture = _mixture(1, batch=1)
    away = mixture.draw(20_000, Noise(3))[0] - mixture.mean[0]
    products = away[:, :, None] * away[:, None]

    assert standard_errors(away, 0.0).abs().max() < 4
    assert standard_errors(products, mixture.factor[0, 0] @ mixture.factor[0, 0].T).abs().max() < 4
    far = CorrelatedMixture(
        torch.tensor([0.0, 100.0, 200.0]).double()[None, :, None], torch.ones(1, 3, 1, 1).double()
    )
    nearest = (far.draw(300, Noise(4)) / 100).round()[0, :, 0].long()
    assert nearest.bincount().tolist() == [100, 100, 100]


def test_the_divergence_of_a_correlated_gaussian():
    """It is that of torch from N(0, I); a mixture has none."""
    one = _mixture(1)
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())

    expected = kl_divergence(_torch(one), prior)[:, 0]
    torch.testing.assert_close(one.divergence(), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="got a mixture of 4"):
        _mixture(4).divergence()


def _pixels() -> tuple[GaussianPixels, Tensor, Incomplete]:
    model = linear_model()
    assert isinstance(model.likelihood, GaussianPixels)
    return model.likelihood, Noise(5).normal(4, 7, *SHAPE, like=LIKE), holes(model, 4)


def test_gaussian_pixels_are_those_of_torch():
    """Density and moments of each pixel, the observed ones alone in the one sum."""
    pixels, means, images = _pixels()
    each = Normal(means, pixels.log_std.exp())
    density = (each.log_prob(images.values[:, None]) * images.observed[:, None]).sum((2, 3, 4))
    entropy = (each.entropy() * ~images.observed[:, None]).sum((2, 3, 4))

    found, expected = pixels.log_densities(means, images)
    torch.testing.assert_close(found, density, rtol=0, atol=1e-10)
    torch.testing.assert_close(expected, -entropy, rtol=0, atol=1e-10)
    torch.testing.assert_close(pixels.mean(means), each.mean)
    torch.testing.assert_close(pixels.mean_square(means), each.variance + each.mean**2)


def test_gaussian_pixels_are_drawn_by_their_quantiles():
    """A uniform number u gives the u-quantile, and the least one a finite pixel."""
    pixels, means, _ = _pixels()
    uniforms = Noise(6).uniform(*means.shape, like=means)
    each = Normal(means, pixels.log_std.exp())

    drawn = pixels.sample(means, uniforms)
    torch.testing.assert_close(each.cdf(drawn), uniforms, rtol=0, atol=1e-10)
    assert pixels.sample(means, torch.zeros_like(means)).isfinite().all()
