"""Estimates of log p(x_o) and log p(x_m | x_o) against quadrature and enumeration."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.latent import Architecture, LatentVariableModel
from model.likelihood import BLOCK, KEPT, PROPOSALS, Estimate, Scores, blocks, score
from model.masks import Incomplete
from model.noise import NoisePerImage
from model.stages import finish
from model.weights import log_mean_exp
from tests.conftest import (
    Quadrature,
    copies,
    every_image,
    fixed_model,
    made_of,
    some_incomplete,
    standard_errors,
)


def _score(
    model: LatentVariableModel,
    images: Incomplete,
    *,
    particles: int = 512,
    proposal: str = "laplace",
    truth: Tensor | None = None,
    known: Tensor | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> Scores:
    noise = NoisePerImage.of(seed, indices or range(len(images)))
    stages = score(
        model,
        images,
        noise,
        particles=particles,
        proposal=proposal,
        truth=truth,
        known=known,
    )
    return finish(stages)


def _completions(images: Incomplete) -> tuple[Incomplete, Tensor]:
    """One image once for each way to fill its holes, and those ways."""
    candidates = every_image()
    agree = (candidates == images.values) | ~images.observed
    truth = candidates[agree.flatten(1).all(1)]
    return copies(images, len(truth)), truth


@pytest.mark.parametrize("latent", [1, 2])
def test_the_oracle_is_a_distribution(latent: int):
    """Quadrature gives Σ_x p(x) = 1 and p(x_o) = Σ p over the completions, on any grid."""
    model = fixed_model(latent=latent)
    rule, images = Quadrature.of(model), some_incomplete(latent=latent)
    every = rule.log_likelihood(Incomplete.complete(every_image()))

    assert abs(every.logsumexp(-1).item()) < 1e-10
    finer = Quadrature.of(model, step=0.0625)
    torch.testing.assert_close(
        rule.log_likelihood(images), finer.log_likelihood(images), rtol=0, atol=1e-9
    )
    for index in range(len(images)):
        _, truth = _completions(images[index : index + 1])
        marginal = rule.log_likelihood(Incomplete.complete(truth)).logsumexp(-1)
        torch.testing.assert_close(marginal, rule.log_likelihood(images)[index])


@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_estimated_probabilities_of_every_image_sum_to_one(proposal: str, latent: int):
    """Σ p̂(x) = 1 over all 512 images within its error, and each p̂(x) is unbiased."""
    model, images = fixed_model(latent=latent), Incomplete.complete(every_image())
    estimate = _score(model, images, proposal=proposal).log_likelihood
    exact = Quadrature.of(model).log_likelihood(images)
    p, error = estimate.value.exp(), estimate.value.exp() * estimate.standard_error

    assert abs(p.sum().item() - 1) < 4 * error.square().sum().sqrt().item()
    assert error.square().sum().sqrt() < 0.03
    assert standard_errors((estimate.value - exact).exp(), 1.0).abs() < 4


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_estimate_of_the_observed_pixels_is_the_marginal(proposal: str):
    """Over repeats p̂(x_o) has mean p(x_o) for any mask: the estimate is unbiased on this scale."""
    model, images = fixed_model(), some_incomplete()
    repeated = _score(model, copies(images, 100), particles=128, proposal=proposal)
    exact = Quadrature.of(model).log_likelihood(images)
    ratio = (repeated.log_likelihood.value.reshape(6, 100) - exact[:, None]).exp()

    assert standard_errors(ratio.T, 1.0).abs().max() < 4.5


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_claimed_errors_are_the_repeats_errors(proposal: str):
    """The standard errors of both estimates are the spread of each over independent repeats."""
    model = fixed_model()
    images, truth = some_incomplete(3), some_incomplete(3, seed=2).values
    scores = _score(
        model,
        copies(images, 200),
        particles=320,
        proposal=proposal,
        truth=truth.repeat_interleave(200, 0),
    )

    assert scores.conditional is not None
    for estimate in (scores.log_likelihood, scores.conditional):
        spread = estimate.value.reshape(3, 200).std(1)
        claimed = estimate.standard_error.reshape(3, 200).square().mean(1).sqrt()
        # Twice the error that a normal sample's deviation would have, for heavier tails.
        assert (spread / claimed - 1).abs().max() < 8 / math.sqrt(2 * 200)


@pytest.mark.parametrize("particles", [1, 3, 100])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_conditional_sums_to_one_for_any_particles(proposal: str, particles: int):
    """Σ p̂(x_m | x_o) = 1 over all completions, to rounding, even with one particle."""
    model, images = fixed_model(), some_incomplete()
    for index in range(3):
        repeated, truth = _completions(images[index : index + 1])
        scores = _score(
            model,
            repeated,
            particles=particles,
            proposal=proposal,
            truth=truth,
            indices=[index] * len(truth),
        )

        assert len(truth) == 2 ** int((~images.observed[index]).sum())
        assert scores.conditional is not None
        assert abs(scores.conditional.value.logsumexp(0).item()) < 1e-10


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_conditional_is_that_of_the_model(proposal: str, share: float):
    """It is log p(x_k) − log p(x_o) by quadrature, within its standard error, of a known x_k."""
    model, images = fixed_model(), some_incomplete(60)
    noise = NoisePerImage.of(1, [0]).noises[0]
    truth = images.fill(model.sample(60, noise))
    known = noise.at("known").uniform(*truth.shape, like=truth) < share
    rule, whole = Quadrature.of(model), Incomplete.hide(truth, known | images.observed)
    exact = rule.log_likelihood(whole) - rule.log_likelihood(images)
    scores = _score(model, images, particles=2048, proposal=proposal, truth=truth, known=known)

    assert scores.conditional is not None
    ratio = (scores.conditional.value - exact) / scores.conditional.standard_error.clamp(min=1e-9)
    assert ratio.abs().max() < 4.5
    assert ratio.square().mean() < 1 + 4 * math.sqrt(2 / 60)


def test_with_everything_missing_the_probability_is_one():
    """No pixels have log p = 0 for any number of particles, with no error, reliably."""
    blank = Incomplete.hide(every_image()[:3], torch.zeros(3, 1, 3, 3, dtype=torch.bool))
    scores = _score(fixed_model(), blank, particles=100)

    torch.testing.assert_close(
        scores.log_likelihood.value, torch.zeros(3).double(), rtol=0, atol=1e-12
    )
    assert (scores.log_likelihood.standard_error < 1e-6).all()
    torch.testing.assert_close(
        scores.log_likelihood.effective_sample_size, torch.full((3,), 100.0).double()
    )


def test_with_nothing_missing_the_conditional_is_one():
    """No pixels have log p(x_m | x_o) = 0, exactly."""
    images = Incomplete.complete(some_incomplete().values)
    scores = _score(fixed_model(), images, particles=70, truth=images.values)

    assert scores.conditional is not None
    assert (scores.conditional.value == 0).all()
    assert (scores.conditional.standard_error < 1e-6).all()


def test_without_the_truth_there_is_no_conditional():
    """Nothing is invented where the missing pixels are not known."""
    assert _score(fixed_model(), some_incomplete(), particles=1).conditional is None


def test_the_truth_under_the_mask_is_all_that_matters():
    """What the truth holds at observed pixels, NaN included, changes nothing."""
    model, images, truth = fixed_model(), some_incomplete(), some_incomplete(seed=2).values
    dirty = torch.where(images.observed, torch.nan, truth)
    clean, other = (_score(model, images, particles=70, truth=t) for t in (truth, dirty))

    assert clean.conditional is not None
    assert other.conditional is not None
    assert torch.equal(clean.conditional.value, other.conditional.value)


@pytest.mark.parametrize("particles", [300, 1024])
def test_what_is_not_kept_is_not_missed(particles: int):
    """Without the decoder's output the estimate is the same, in groups of blocks and by pieces."""
    model, images = fixed_model(), some_incomplete(count=9)
    alone = _score(model, images, particles=particles, proposal="own").log_likelihood
    beside = _score(
        model, images, particles=particles, proposal="own", truth=images.values
    ).log_likelihood

    torch.testing.assert_close(alone.value, beside.value, rtol=0, atol=1e-12)
    assert alone.particles == beside.particles == particles
    torch.testing.assert_close(alone.pareto_k, beside.pareto_k, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pixels", [0, 2**14, 2**20])
@pytest.mark.parametrize(("decoder", "portion"), [("mlp", KEPT), ("gated-conv", 1)])
def test_portions_do_not_depend_on_how_many_are_made_together(
    monkeypatch: pytest.MonkeyPatch, decoder: str, portion: int, pixels: int
):
    """The same particles are given out, as many at a time, of images of any number and size."""
    monkeypatch.setattr("model.likelihood.PIXELS", pixels)
    model = made_of(Architecture(image_shape=(1, 3, 3), latent=2, decoder=decoder, hidden=(8,)))
    images = some_incomplete(count=2)
    noise, particles = NoisePerImage.of(0, range(2)), 19 * BLOCK + 1
    with torch.no_grad():
        ahead, apart = (
            list(blocks(model, images, noise, particles=particles, proposal="own", may_stop=stops))
            for stops in (False, True)
        )

    sizes = [block.latents.shape[1] for block in ahead]
    assert sizes[:-1] == [portion * BLOCK] * (len(sizes) - 1)
    assert sum(sizes) == particles
    for one, other in zip(ahead, apart, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.parameters is not None
        assert other.parameters is not None
        torch.testing.assert_close(one.parameters, other.parameters)
        torch.testing.assert_close(one.log_weights, other.log_weights)


@pytest.mark.parametrize("with_truth", [False, True])
def test_no_more_particles_are_drawn_than_a_tolerance_takes(with_truth: bool):  # noqa: FBT001
    """All errors are then below it, they were not one step before, and the truth is near.

    What was found is what that number of particles finds.
    """
    model, images = fixed_model(), some_incomplete(count=1)
    truth = images.values if with_truth else None
    step = KEPT * BLOCK
    noise = NoisePerImage.of(0, [0])

    def scored(particles: int, tolerance: float | None = None) -> list[Estimate]:
        found = finish(
            score(
                model,
                images,
                noise,
                particles=particles,
                proposal="own",
                truth=truth,
                tolerance=tolerance,
            )
        )
        return [each for each in (found.log_likelihood, found.conditional) if each is not None]

    enough = scored(100_000, 0.01)
    used = enough[0].particles
    assert step < used < 100_000
    assert all((each.standard_error <= 0.01).all() for each in enough)
    assert max(each.standard_error.item() for each in scored(used - step)) > 0.01
    for stopped, plain in zip(enough, scored(used), strict=True):
        torch.testing.assert_close(stopped.value, plain.value, rtol=0, atol=1e-12)
    exact = Quadrature.of(model).log_likelihood(images)
    assert abs(enough[0].value - exact).item() < 0.05


def test_particles_are_the_most_that_a_tolerance_takes():
    """Where they do not suffice the error says so; an error in doubt stops nothing."""
    model, images = fixed_model(), some_incomplete(count=1)
    noise = NoisePerImage.of(0, [0])
    for particles, tolerance in ((500, 1e-6), (BLOCK - 1, 10.0)):
        found = finish(
            score(model, images, noise, particles=particles, tolerance=tolerance)
        ).log_likelihood

        assert found.particles == particles


def test_the_bound_grows_with_the_particles():
    """E log p̂ of 1, 2, 4, … 64 particles rises to log p(x_o): over the same particles, surely."""
    model, images = fixed_model(), some_incomplete()
    many = copies(images, 100)
    noise = NoisePerImage.of(0, range(len(many)))
    (block,) = blocks(model, many, noise, particles=BLOCK, proposal="own")
    exact = Quadrature.of(model).log_likelihood(images)
    sizes = [1, 2, 4, 8, 16, 32, 64]
    bounds = torch.stack(
        [log_mean_exp(block.log_weights.unflatten(-1, (-1, k))).mean(-1) for k in sizes]
    )
    gaps = exact - bounds.reshape(len(sizes), 6, 100).mean(-1)

    assert (bounds.diff(dim=0) > 0).all()
    assert (gaps[:-2] > 0).all()
    assert (gaps[-1].abs() < gaps[0] / 4).all()


def test_an_estimate_knows_what_it_is():
    """Its name, its particles, and whether its error may be believed: NaN may not."""
    few = _score(fixed_model(), some_incomplete(), particles=10).log_likelihood
    many = _score(
        fixed_model(), some_incomplete(), particles=1024, proposal="adapted"
    ).log_likelihood

    assert (few.estimator, few.particles) == ("importance", 10)
    assert few.pareto_k.isnan().all()
    assert not few.reliable.any()
    assert many.reliable.all()


def test_the_prior_is_an_honest_but_poor_proposal():
    """Of a sharp model a proposal far away has a shape above 0.7: its error is not believed."""
    model = fixed_model(gain=6.0)
    with torch.no_grad():
        model.get_parameter("encoder.layers.2.bias").add_(3.0)
        model.get_parameter("encoder.layers.2.bias")[2:] = -2.5
    estimate = _score(model, some_incomplete(), particles=2048, proposal="zero-filled")

    assert not estimate.log_likelihood.reliable.any()
