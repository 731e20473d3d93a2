"""Every estimator of log p(x_o) against factor analysis, where it is known, and quadrature."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from model.annealing import annealed
from model.estimators import (
    CHAINS,
    ESTIMATORS,
    QUALITIES,
    Asked,
    assess,
    estimate,
)
from model.latent import LatentVariableModel
from model.likelihood import PROPOSALS, Estimate
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage
from model.proposal import Blend, CorrelatedMixture, GaussianMixture, PriorProposal
from model.stages import finish
from model.weights import log_mean_exp
from tests.conftest import Quadrature, copies, fixed_model, small_model, some_incomplete
from tests.test_model_factor_analysis import exact, holes, linear_model

IMAGES, PARTICLES = 500, 1000
SCALE, SHIFT = 1.5, 0.5
"""How much too wide the proposal is, and by how many of the posterior's deviations it is off."""
LIKE = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Oracle:
    """A linear model, images with holes, what is true of them, and a proposal that is not."""

    truth: Tensor
    found: dict[str, Estimate]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """All estimators on twenty pixels and five latents, with a mismatched proposal."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, IMAGES)
    posterior = exact(model).posterior(images)
    direction = torch.nn.functional.normalize(Noise(2).normal(5, like=LIKE), dim=0)
    shift = posterior.factor @ (SHIFT * math.sqrt(5) * direction)
    mismatched = CorrelatedMixture(posterior.mean + shift, SCALE * posterior.factor)
    found = {
        name: finish(estimator(Asked(model, images, Noise(3).at(name), PARTICLES, mismatched)))
        for name, estimator in ESTIMATORS.items()
    }
    return Oracle(exact(model).log_likelihood(images), found)


@pytest.mark.parametrize("name", ["importance", "adaptive", "annealed"])
def test_weights_are_unbiased_and_their_errors_are_true(oracle: Oracle, name: str):
    """(p̂ / p − 1) in its standard errors has mean 0 ± 0.15 and a deviation of 0.8 to 1.25."""
    found = oracle.found[name]
    off = (found.value - oracle.truth).expm1() / found.standard_error

    assert abs(off.mean().item()) < 0.15
    assert 0.8 < off.std().item() < 1.25


@pytest.mark.parametrize("name", ["jackknife", "jackknife-2"])
def test_what_is_debiased_is_unbiased_in_nats(oracle: Oracle, name: str):
    """So are the standardised errors of the logarithm itself."""
    found = oracle.found[name]
    off = (found.value - oracle.truth) / found.standard_error

    assert abs(off.mean().item()) < 0.15
    assert 0.8 < off.std().item() < 1.25
    assert found.kind == "debiased"


@pytest.mark.parametrize("name", ["prior", "importance", "adaptive", "annealed"])
def test_bounds_are_below_the_truth(oracle: Oracle, name: str):
    """On average, as far as their errors let one see, whatever the proposal is."""
    found = oracle.found[name]
    off = found.value - oracle.truth

    assert off.mean() < 2 * off.std() / math.sqrt(IMAGES)
    assert found.kind == "lower bound"


@pytest.mark.parametrize("name", ["prior", "importance"])
def test_with_few_particles_bounds_are_far_below(name: str):
    """Where the error is large their bias is plain."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, IMAGES)
    posterior = exact(model).posterior(images)
    wide = CorrelatedMixture(posterior.mean + 0.3, 2.5 * posterior.factor)
    found = finish(ESTIMATORS[name](Asked(model, images, Noise(1), 64, wide)))
    off = found.value - exact(model).log_likelihood(images)

    assert off.mean() < -3 * off.std() / math.sqrt(IMAGES)


def test_the_jackknife_takes_half_of_the_bias_away():
    """With 256 particles, over so many repetitions that the bias of the bound is plain."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    one = holes(model, 12)[2:]
    images, truth = copies(one, 400), exact(model).log_likelihood(one)
    posterior = exact(model).posterior(images)
    wide = CorrelatedMixture(posterior.mean, 2.0 * posterior.factor)
    biases = {
        name: finish(ESTIMATORS[name](Asked(model, images, Noise(1), 256, wide))).value
        - truth.repeat_interleave(400)
        for name in ("importance", "jackknife", "jackknife-2")
    }
    bound = biases["importance"].mean()

    assert bound < -5 * biases["importance"].std() / math.sqrt(4000)
    assert biases["jackknife"].mean().abs() < bound.abs() / 2
    assert biases["jackknife-2"].mean().abs() < bound.abs() / 2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_exact_model_gives_the_exact_number(name: str):
    """Whichever estimator was asked for, the answer says that it is exact, with no error."""
    model = linear_model()
    images = holes(model, 4)
    found = finish(estimate(model, images, Noise(0), estimator=name, particles=200))

    torch.testing.assert_close(found.value, exact(model).log_likelihood(images))
    assert (found.kind, found.estimator) == ("exact", "exact")
    assert (found.standard_error < 1e-6).all()


@pytest.mark.parametrize("upper", [0, 1])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_comes_close(name: str, upper: int):
    """With 2000 particles of a model of one or two layers it is within a few of its errors."""
    model = small_model(image_shape=(1, 2, 2), latent=1 if upper else 2, upper=upper)
    model.requires_grad_(requires_grad=False)
    values = model.sample(5, Noise(1))
    seen = Noise(1).at("mask").uniform(*values.shape, like=values) < 0.6
    seen[0], seen[1] = True, False
    images = Incomplete.hide(values, seen)
    found = finish(estimate(model, images, Noise(2), estimator=name, particles=2000))

    off = (found.value - _quadrature(model, images)).abs()
    assert (off < 4.5 * found.standard_error + 1e-3).all()
    assert found.estimator == name
    assert found.value[1].abs() < 4.5 * found.standard_error[1] + 1e-3


def _quadrature(model: LatentVariableModel, images: Incomplete) -> Tensor:
    if not model.architecture.upper:
        return Quadrature.of(model).log_likelihood(images)
    axis = torch.arange(-8, 8.1, 0.1, dtype=torch.float64)
    standard = torch.cartesian_prod(axis, axis)
    log_mass = -0.5 * standard.square().sum(-1) - math.log(2 * math.pi) + 2 * math.log(0.1)
    logits = model.decode(model.prior.from_standard(standard[None]))
    many = model.likelihood.log_density(logits.expand(len(images), -1, -1, -1, -1), images)
    return (many + log_mass).logsumexp(-1)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_every_proposal_gives_the_same_likelihood(proposal: str):
    """The weights of each have the mean p(x_o), also in inference mode as the service has it."""
    model, images = fixed_model(), some_incomplete()
    many = copies(images, 20)
    with torch.inference_mode():
        found = finish(estimate(model, many, Noise(4), particles=512, proposal=proposal))
    expected = Quadrature.of(model).log_likelihood(images).repeat_interleave(20)

    off = (found.value - expected).expm1().unflatten(0, (6, 20))
    error = off.std(-1) / math.sqrt(20)
    assert (off.mean(-1).abs() < 4.5 * error + 1e-3).all()


def test_annealing_works_in_inference_mode():
    """The same bits as outside of it: autograd is asked for where it is needed alone."""
    model, images = fixed_model(), some_incomplete()
    outside = finish(estimate(model, images, Noise(0), estimator="annealed", particles=100))
    with torch.inference_mode():
        inside = finish(estimate(model, images, Noise(0), estimator="annealed", particles=100))

    assert torch.equal(outside.value, inside.value)
    assert outside.particles == CHAINS


def test_more_temperatures_tighten_the_bound():
    """From far away few temperatures give too little on average, and many nearly all."""
    model = linear_model(shape=(1, 4, 5), latent=5)
    images = holes(model, 200)
    posterior = exact(model).posterior(images)
    far = CorrelatedMixture(posterior.mean + 0.7, 1.5 * posterior.factor)
    gaps = [
        (
            exact(model).log_likelihood(images)
            - log_mean_exp(
                finish(
                    annealed(model, images, far, Noise(1), temperatures=count, chains=CHAINS)
                ).log_weights
            )
        ).mean()
        for count in (2, 10, 50)
    ]

    assert gaps[0] > gaps[1] > gaps[2]
    assert abs(gaps[2]) < 0.02


@pytest.mark.parametrize(("name", "fewest"), [("jackknife", 65), ("jackknife-2", 129)])
def test_the_jackknife_needs_groups_to_leave_out(name: str, fewest: int):
    """One particle fewer is refused, with what was expected and what came."""
    model, images = fixed_model(), some_incomplete()

    found = finish(estimate(model, images, Noise(0), estimator=name, particles=fewest))
    assert found.particles == 64 * (fewest // 64 + 1)
    with pytest.raises(ValueError, match=f"Expected more than {fewest - 1} .* got {fewest - 1}"):
        finish(estimate(model, images, Noise(0), estimator=name, particles=fewest - 1))


def test_the_jackknife_of_many_particles_has_few_groups():
    """With 8000 particles 63 groups of two blocks, and the same mean of the weights."""
    model, images = fixed_model(), some_incomplete()
    found = finish(estimate(model, images, Noise(0), estimator="jackknife-2", particles=8000))
    plain = finish(estimate(model, images, Noise(0), particles=found.particles))

    assert found.particles == 63 * 128
    assert ((found.value - plain.value).abs() < found.standard_error).all()
    torch.testing.assert_close(found.standard_error, plain.standard_error, rtol=0.5, atol=0)


def test_an_unknown_estimator_is_refused():
    """The error names those that there are."""
    with pytest.raises(ValueError, match=r"Expected an estimator of prior, importance, .* 'best'"):
        finish(estimate(fixed_model(), some_incomplete(), Noise(0), estimator="best"))


# Proposals of estimators.


def test_a_blend_is_a_mixture():
    """Its density is that of its parts by their shares, and so are its draws."""
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    parts = [
        GaussianMixture(zero, zero),
        GaussianMixture(zero + 50, zero),
        GaussianMixture(zero - 50, zero),
    ]
    blend = Blend(parts, [0.5, 0.3, 0.2])
    z = blend.draw(1000, Noise(0))
    where = (z / 50).round().flatten().long() + 1

    assert where.bincount().tolist() == pytest.approx([200, 500, 300], abs=1)
    assert where[:500].bincount().tolist() != [200, 300, 0]
    each = [part.log_density(z).exp() for part in parts]
    expected = (0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2]).log()
    torch.testing.assert_close(blend.log_density(z), expected)
    with pytest.raises(ValueError, match="got a blend"):
        blend.divergence()


def test_a_priors_standard_numbers_are_one_to_one():
    """From them and to them is where one was, and their density is that of p(z) but for |dz|."""
    model = small_model(image_shape=(1, 2, 2), upper=1)
    u = Noise(0).normal(2, 3, 3, like=LIKE)
    z = model.prior.from_standard(u)
    jacobian = torch.func.vmap(
        torch.func.jacfwd(lambda one: model.prior.from_standard(one[None])[0])
    )(u.flatten(0, 1))
    normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
    expected = normal - torch.linalg.det(jacobian).abs().log().unflatten(0, (2, 3))

    torch.testing.assert_close(model.prior.to_standard(z), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.prior.log_density(z), expected, rtol=0, atol=1e-10)


def test_the_prior_as_a_proposal_has_the_likelihood_as_its_weight():
    """Log w is log p(x_o | z), and its divergence from itself is zero."""
    model, images = fixed_model(), some_incomplete()
    prior = PriorProposal(model.prior, images.values)
    particles = model.particles(images, prior, prior.draw(10, Noise(0)))

    torch.testing.assert_close(particles.log_weights, particles.log_likelihood)
    assert (prior.divergence() == 0).all()


# Qualities


def test_an_answer_is_doubtful_where_its_error_is_not_believed_or_few_particles_count():
    """By k̂ above 0.7 or NaN, or an effective sample size below 10; of less than a block never."""
    whole = Estimate(
        value=torch.zeros(4),
        standard_error=torch.zeros(4),
        effective_sample_size=torch.tensor([50.0, 50.0, 9.9, 50.0]),
        pareto_k=torch.tensor([0.7, 0.71, 0.1, torch.nan]),
        particles=64,
        estimator="importance",
        kind="lower bound",
    )

    assert whole.doubtful.tolist() == [False, True, True, True]
    assert not replace(whole, particles=63).doubtful.any()


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_finds_the_three_probabilities(quality: str):
    """Log p(x_o), and log p(x_m | x_o) as a mixture and as a difference, within their errors."""
    model, hidden = fixed_model(), some_incomplete(seed=5)
    truth = hidden.fill(1 - hidden.values)
    found = finish(
        assess(
            model,
            hidden,
            NoisePerImage.of(0, range(6)),
            quality=QUALITIES[quality],
            particles=2000,
            truth=truth,
        )
    )
    rule = Quadrature.of(model)
    seen, whole = rule.log_likelihood(hidden), rule.log_likelihood(Incomplete.complete(truth))

    assert found.conditional is not None
    assert found.difference is not None
    for part, expected in (
        (found.log_likelihood, seen),
        (found.conditional, whole - seen),
        (found.difference, whole - seen),
    ):
        assert ((part.value - expected) / part.standard_error).abs().max() < 4.5
    assert found.difference.kind == "difference"
    assert (found.log_likelihood.acceptance is None) == (quality != "high")


def test_the_difference_of_an_exact_model_is_exact():
    """So is the conditional: the density of the missing pixels given the others, no error."""
    model = linear_model(shape=(1, 2, 3), latent=2)
    images = holes(model, 3)
    truth = images.fill(torch.full_like(images.values, 0.25))
    whole = finish(
        assess(
            model,
            images,
            Noise(0),
            quality=QUALITIES["standard"],
            particles=64,
            truth=truth,
        )
    )
    found = whole.difference
    mean, covariance = exact(model).conditional(images)

    assert found is not None
    assert whole.conditional is not None
    assert (found.kind, found.standard_error.max().item()) == ("exact", 0)
    torch.testing.assert_close(whole.conditional.value, found.value)
    assert whole.conditional.kind == "exact"
    holed = [(i, ~seen) for i, seen in enumerate(images.observed.flatten(1)) if not seen.all()]
    assert holed
    for index, missing in holed:
        gaussian = torch.distributions.MultivariateNormal(
            mean[index, missing], covariance[index][missing][:, missing]
        )
        expected = gaussian.log_prob(truth[index].flatten()[missing])
        torch.testing.assert_close(found.value[index], expected)
