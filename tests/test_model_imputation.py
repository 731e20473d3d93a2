"""Completions against quadrature, enumeration and simulation-based calibration."""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from model.imputation import Completions, impute
from model.latent import LatentVariableModel
from model.likelihood import PROPOSALS, blocks, finish
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage, Source
from tests.conftest import (
    Quadrature,
    copies,
    every_image,
    fixed_model,
    some_incomplete,
    standard_errors,
)

COUNT = 1500


def _impute(
    model: LatentVariableModel,
    images: Incomplete,
    *,
    particles: int = 512,
    draws: int = 1,
    proposal: str = "laplace",
) -> Completions:
    noise = NoisePerImage.of(0, range(len(images)))
    return finish(
        impute(model, images, noise, particles=particles, draws=draws, proposal=proposal)
    )


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_mean_and_deviation_are_those_of_the_posterior(proposal: str):
    """E[x | x_o] and the deviation of x given x_o are the model's, by quadrature."""
    model, images = fixed_model(), some_incomplete()
    found = _impute(model, copies(images, 40), proposal=proposal)
    exact = Quadrature.of(model).posterior_mean(images)
    missing = ~images.observed

    mean = found.mean.unflatten(0, (6, 40)).transpose(0, 1)
    assert standard_errors(mean, exact)[missing].abs().max() < 4.5
    binary = (found.mean * (1 - found.mean)).sqrt()  # what a binary pixel of this mean has
    hidden = missing.repeat_interleave(40, 0)
    torch.testing.assert_close(found.std[hidden], binary[hidden], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_draws_are_completions_with_the_models_probabilities(proposal: str):
    """Every completion x_m comes as often as p(x_m | x_o) says, correlations included."""
    model, images = fixed_model(), some_incomplete(1, seed=12)
    rule = Quadrature.of(model)
    repeats = copies(images, COUNT)
    draws = _impute(model, repeats, particles=128, proposal=proposal).draws.flatten(1)
    code = (2.0 ** torch.arange(8, -1, -1)).double()
    candidates = every_image()
    agree = ((candidates == images.values) | ~images.observed).flatten(1).all(1)
    p = rule.log_likelihood(Incomplete.complete(candidates[agree])).softmax(-1)
    counts = (draws @ code).long().bincount(minlength=512)[agree]
    common = p > 5 / COUNT
    got = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = COUNT * torch.cat([p[common], p[~common].sum()[None]])

    assert counts.sum() == COUNT
    assert common.sum() > 4
    assert chisquare(got, expected).pvalue > 1e-3


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_what_was_seen_comes_back_untouched(proposal: str):
    """Observed pixels are the image's to the bit in mean and draws, with no deviation."""
    images = some_incomplete()
    found = _impute(fixed_model(), images, particles=70, draws=3, proposal=proposal)
    seen = images.observed

    assert torch.equal(found.mean[seen], images.values[seen])
    assert (found.std[seen] == 0).all()
    assert (found.std[~seen] > 0).all()
    for draw in found.draws.unbind(1):
        assert torch.equal(draw[seen], images.values[seen])
        assert set(draw[~seen].unique().tolist()) <= {0.0, 1.0}


def test_with_nothing_missing_the_image_comes_back():
    """There is nothing to guess: mean and draws are the image, the deviation is zero."""
    images = Incomplete.complete(some_incomplete().values)
    found = _impute(fixed_model(), images, particles=70, draws=2)

    assert torch.equal(found.mean, images.values)
    assert torch.equal(found.draws, images.values[:, None].expand(-1, 2, -1, -1, -1))
    assert (found.std == 0).all()


def test_with_everything_missing_the_prior_is_imputed():
    """The mean is the prior's predictive mean, and log p of nothing is 0."""
    model, nothing = fixed_model(), torch.zeros(60, 1, 3, 3)
    blank = Incomplete(nothing.double(), nothing.bool())
    found = _impute(model, blank, particles=256)
    exact = Quadrature.of(model).posterior_mean(blank[:1])[0]

    torch.testing.assert_close(
        found.log_likelihood.value, torch.zeros(60).double(), rtol=0, atol=1e-12
    )
    assert standard_errors(found.mean, exact).abs().max() < 4.5
    assert standard_errors(found.draws[:, 0], exact).abs().max() < 4.5


def test_draws_take_particles_of_every_block_by_their_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    """Each draw's latent is particle k with probability w̃_k, whichever block it came in."""
    model, images, taken = fixed_model(), some_incomplete(1), list[Tensor]()
    whole = LatentVariableModel.impute

    def recorded(
        self: LatentVariableModel, images: Incomplete, latents: Tensor, noise: Source
    ) -> Tensor:
        taken.append(latents)
        return whole(self, images, latents, noise)

    monkeypatch.setattr(LatentVariableModel, "impute", recorded)
    _impute(model, images, particles=200, draws=5000, proposal="zero-filled")
    parts = list(blocks(model, images, _noise(1), particles=200, proposal="zero-filled"))
    z = torch.cat([p.latents for p in parts], 1)[0]
    w = torch.cat([p.log_weights for p in parts], 1)[0].softmax(-1)
    counts = (taken[-1][0][:, None] == z).all(-1).sum(0).split([64, 64, 64, 8])

    shares = torch.stack([part.sum() for part in w.split([64, 64, 64, 8])])
    assert sum(int(c.sum()) for c in counts) == 5000
    assert chisquare([int(c.sum()) for c in counts], 5000 * shares).pvalue > 1e-3


def test_completions_carry_the_likelihood_of_what_was_seen():
    """It is the estimate that `score` makes of the same particles."""
    model, images = fixed_model(), some_incomplete()
    found = _impute(model, images, particles=130)
    log_w = torch.cat([b.log_weights for b in blocks(model, images, _noise(6), particles=130)], -1)

    assert found.log_likelihood.particles == 130
    torch.testing.assert_close(
        found.log_likelihood.value, log_w.exp().mean(-1).log(), rtol=1e-10, atol=1e-10
    )


def _noise(count: int) -> NoisePerImage:
    return NoisePerImage.of(0, range(count))


# Simulation-based calibration (Talts et al., 2018): of a truth that the model itself made, the
# rank among draws given a part of it is uniform.

IMAGES, DRAWS = 400, 19
Draw = Callable[[LatentVariableModel, Incomplete], Tensor]


def _weighted(proposal: str) -> Draw:
    def draw(model: LatentVariableModel, images: Incomplete) -> Tensor:
        return _impute(model, images, particles=256, draws=DRAWS, proposal=proposal).draws

    return draw


def _unweighted(model: LatentVariableModel, images: Incomplete) -> Tensor:
    """What draws would be if the weights were forgotten."""
    noise = _noise(len(images))
    (block,) = blocks(model, images, noise, particles=DRAWS, proposal="zero-filled")
    return model.impute(images, block.latents, noise.at("draws"))


def _calibration(draw: Draw, *, seed: int) -> float:
    """The p-value of uniform ranks; ties are broken by chance."""
    model = fixed_model(image_shape=(1, 4, 4), latent=3, gain=2.5)
    truth = model.sample(IMAGES, Noise(seed))
    seen = Noise(seed).at("mask").uniform(*truth.shape, like=truth) < 0.5
    draws = draw(model, Incomplete.hide(truth, seen))
    # The missing pixels, each weighted by what the seen ones tell of it: draws that do not heed
    # x_o, such as the prior's, would pass with fixed weights.
    example = model.sample(2000, Noise(0)).flatten(1)
    told = ((truth.flatten(1) - example.mean(0)) * seen.flatten(1)) @ example.T.cov()
    choices = torch.cat([truth[:, None], draws], 1).flatten(2)
    statistic = (choices * (told * ~seen.flatten(1))[:, None]).sum(-1)
    ties = Noise(seed).at("ties").uniform(*statistic.shape, like=truth)
    below = statistic[:, 1:] < statistic[:, :1] - 1e-9
    level = (statistic[:, 1:] - statistic[:, :1]).abs() <= 1e-9
    rank = (below | (level & (ties[:, 1:] < ties[:, :1]))).sum(1)
    return float(chisquare(rank.bincount(minlength=DRAWS + 1)).pvalue)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_truth_is_like_a_draw(proposal: str, seed: int):
    """Among 19 draws the truth has each of the 20 ranks as often, whatever the proposal."""
    assert _calibration(_weighted(proposal), seed=seed) > 1e-3


def test_draws_without_weights_are_not_calibrated():
    """The test has power: draws from the proposal itself fail it."""
    assert _calibration(_unweighted, seed=1) < 1e-4
