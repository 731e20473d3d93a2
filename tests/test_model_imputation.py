"""Completions against quadrature, enumeration and simulation-based calibration."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from model.estimators import QUALITIES, Quality
from model.imputation import Completions, impute
from model.latent import Architecture, LatentVariableModel
from model.likelihood import BLOCK, KEPT, PROPOSALS, blocks
from model.masks import Incomplete
from model.noise import Noise, NoisePerImage, Source
from model.stages import finish
from tests.conftest import (
    Quadrature,
    copies,
    every_image,
    fixed_model,
    made_of,
    some_incomplete,
    standard_errors,
)
from tests.test_model_factor_analysis import exact, holes, linear_model

COUNT = 1500


WAYS = {
    **{proposal: Quality("importance", proposal) for proposal in PROPOSALS},
    "annealed": QUALITIES["high"],
}
QUICK = [way for way in WAYS if way != "svi"]


def _impute(
    model: LatentVariableModel,
    images: Incomplete,
    *,
    particles: int = 512,
    draws: int = 1,
    levels: Sequence[float] = (),
    way: str = "laplace",
    tolerance: float | None = None,
) -> Completions:
    return finish(
        impute(
            model,
            images,
            NoisePerImage.of(0, range(len(images))),
            particles=particles,
            draws=draws,
            levels=levels,
            proposal=WAYS[way].proposal,
            estimator=WAYS[way].estimator,
            tolerance=tolerance,
        )
    )


@pytest.mark.parametrize("way", QUICK)
def test_mean_and_deviation_are_those_of_the_posterior(way: str):
    """E[x | x_o] and the deviation of x given x_o are the model's, by quadrature."""
    model, images = fixed_model(), some_incomplete()
    found = _impute(model, copies(images, 40), way=way)
    exact = Quadrature.of(model).posterior_mean(images)
    missing = ~images.observed

    mean = found.mean.unflatten(0, (6, 40)).transpose(0, 1)
    assert standard_errors(mean, exact)[missing].abs().max() < 4.5
    binary = (found.mean * (1 - found.mean)).sqrt()  # what a binary pixel of this mean has
    hidden = missing.repeat_interleave(40, 0)
    torch.testing.assert_close(found.std[hidden], binary[hidden], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", QUICK)
def test_draws_are_completions_with_the_models_probabilities(way: str):
    """Every completion x_m comes as often as p(x_m | x_o) says, correlations included."""
    model, images = fixed_model(), some_incomplete(1, seed=12)
    rule = Quadrature.of(model)
    count = COUNT // 3 if way == "annealed" else COUNT
    repeats = copies(images, count)
    draws = _impute(model, repeats, particles=128, way=way).draws.flatten(1)
    code = (2.0 ** torch.arange(8, -1, -1)).double()
    candidates = every_image()
    agree = ((candidates == images.values) | ~images.observed).flatten(1).all(1)
    p = rule.log_likelihood(Incomplete.complete(candidates[agree])).softmax(-1)
    counts = (draws @ code).long().bincount(minlength=512)[agree]
    common = p > 5 / count
    got = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = count * torch.cat([p[common], p[~common].sum()[None]])

    assert counts.sum() == count
    assert common.sum() > 4
    assert chisquare(got, expected).pvalue > 1e-3


@pytest.mark.parametrize("way", ["laplace", "annealed"])
def test_what_was_seen_comes_back_untouched(way: str):
    """Observed pixels are the image's to the bit in all outputs, with no deviation."""
    images = some_incomplete()
    found = _impute(fixed_model(), images, particles=70, draws=3, levels=[0.1, 0.9], way=way)
    seen = images.observed

    assert torch.equal(found.mean[seen], images.values[seen])
    assert (found.std[seen] == 0).all()
    assert (found.std[~seen] > 0).all()
    for draw in [*found.draws.unbind(1), *found.quantiles.unbind(1)]:
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
    _impute(model, images, particles=200, draws=5000, way="zero-filled")
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


def test_completions_take_no_more_particles_than_a_tolerance():
    """They are then those of so many particles, to the bit."""
    model, images = fixed_model(), some_incomplete(count=1)

    enough = _impute(model, images, particles=100_000, draws=3, tolerance=0.02)
    used = enough.log_likelihood.particles
    plain = _impute(model, images, particles=used, draws=3)
    fewer = _impute(model, images, particles=used - KEPT * BLOCK).log_likelihood

    assert KEPT * BLOCK < used < 100_000
    assert enough.log_likelihood.standard_error.item() <= 0.02
    assert fewer.standard_error.item() > 0.02 or fewer.doubtful.item()
    torch.testing.assert_close(enough.mean, plain.mean, rtol=0, atol=1e-12)
    assert torch.equal(enough.draws, plain.draws)


# Quantiles


def test_quantiles_of_binary_pixels_are_those_of_their_mean():
    """A pixel is one from the level on that its chance of being zero is."""
    images, levels = some_incomplete(), [0.05, 0.5, 0.95]
    found = _impute(fixed_model(), images, levels=levels)
    missing = ~images.observed

    for level, pixels in zip(levels, found.quantiles.unbind(1), strict=True):
        assert torch.equal(pixels[missing], (1 - found.mean[missing] < level).double())


@pytest.mark.parametrize("way", ["laplace", "annealed"])
def test_quantiles_of_real_pixels_are_those_of_the_posterior(way: str):
    """Of factor analysis, whose missing pixels are Gaussian given what was seen.

    What completes has its decoder, and an encoder that knows nothing of the posterior.
    """
    model = linear_model(shape=(1, 2, 3), latent=2)
    guessing = replace(model.architecture, encoder="mlp", hidden=(4,)).build(Noise(0)).double()
    guessing.load_state_dict(model.state_dict(), strict=False)
    images, levels = holes(model, 4), torch.tensor([0.05, 0.5, 0.95]).double()
    found = _impute(
        guessing.frozen(), copies(images, 40), levels=levels.tolist(), way=way
    ).quantiles
    mean, covariance = exact(model).conditional(images)
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()
    truth = mean[:, None] + torch.special.ndtri(levels)[:, None] * deviation[:, None]
    several = found.flatten(2).unflatten(0, (4, 40)).transpose(0, 1)
    missing = ~images.observed.flatten(1)[:, None].expand_as(truth)

    assert standard_errors(several, truth)[missing].abs().max() < 4.5


# Two ways to be completed


def _two_sided() -> LatentVariableModel:
    """A model in which the first pixel is lit at z of ±1.5, and the last two for z above 0.

    The second pixel says a little of the side.
    """
    model = fixed_model(image_shape=(1, 2, 2), latent=1)
    first, last = (layer for layer in model.decoder.modules() if isinstance(layer, nn.Linear))
    edges = torch.tensor([-2.2, -0.8, 0.8, 2.2]).double()
    bumps = torch.tensor([3.0, -3.0, 3.0, -3.0]).double()
    side = torch.tensor([0.0, 0.5, 0.5, 0.0]).double()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        first.weight[:4, 0], first.bias[:4] = 4.0, -4 * edges
        last.weight[0, :4], last.weight[1, :4], last.bias[0] = bumps, 0.4 * side, -3.0
        last.weight[2:, :4] = 8 * side
    return model


@pytest.mark.parametrize("way", ["laplace", "annealed"])
def test_draws_find_both_modes_in_the_right_proportion(way: str):
    """Where what is missing is either all zeros or all ones, each comes as often as it should."""
    model = _two_sided()
    values = torch.tensor([1.0, 1.0, 0.0, 0.0]).double().reshape(1, 1, 2, 2)
    images = Incomplete.hide(values, torch.tensor([True, True, False, False]).view(1, 1, 2, 2))
    rule = Quadrature.of(model, step=1 / 64)
    lit = rule.logits.sigmoid()[:, 2:]
    each = torch.stack([lit.prod(-1), (1 - lit).prod(-1)], -1)
    (exact_shares,) = rule.posterior(images) @ each
    draws = _impute(model, copies(images, 1000), particles=256, way=way).draws.flatten(1)[:, 2:]
    shares = torch.stack([(draws.sum(1) == 2), (draws.sum(1) == 0)], -1).double().mean(0)

    assert 0.5 < exact_shares[0] < 0.7
    assert exact_shares.sum() > 0.9
    assert (shares - exact_shares).abs().max() < 0.05


def _noise(count: int) -> NoisePerImage:
    return NoisePerImage.of(0, range(count))


# Simulation-based calibration (Talts et al., 2018): of a truth that the model itself made, the
# rank among draws given a part of it is uniform.

IMAGES, DRAWS = 400, 19
LARGE, FEW = "gated convolutions", 80
Draw = Callable[[LatentVariableModel, Incomplete], Tensor]


def _weighted(way: str, *, particles: int = 256) -> Draw:
    def draw(model: LatentVariableModel, images: Incomplete) -> Tensor:
        return _impute(model, images, particles=particles, draws=DRAWS, way=way).draws

    return draw


def _unweighted(model: LatentVariableModel, images: Incomplete) -> Tensor:
    """What draws would be if the weights were forgotten."""
    noise = _noise(len(images))
    (block,) = blocks(model, images, noise, particles=DRAWS, proposal="zero-filled")
    return model.impute(images, block.latents, noise.at("draws"))


def _calibration(
    draw: Draw, *, seed: int, images: int = IMAGES, architecture: Architecture | None = None
) -> float:
    """The p-value of uniform ranks; ties are broken by chance."""
    shape = (1, 4, 4)
    model = fixed_model(image_shape=shape, latent=3, gain=2.5)
    if architecture is not None:
        model = made_of(replace(architecture, image_shape=shape), gain=2.5)
    truth = model.sample(images, Noise(seed))
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
@pytest.mark.parametrize("way", WAYS)
def test_the_truth_is_like_a_draw(way: str, seed: int):
    """Among 19 draws the truth has each of the 20 ranks as often, however they are made."""
    assert _calibration(_weighted(way), seed=seed) > 1e-3


FAMILY = {
    "two layers": Architecture(latent=3, upper=2, hidden=(8,), upper_hidden=(6,)),
    "gated convolutions": Architecture(
        latent=3, hidden=(8,), encoder="gated-conv", decoder="gated-conv"
    ),
    "a linear decoder": Architecture(latent=3, hidden=(8,), decoder="linear"),
    "real pixels": Architecture(latent=3, hidden=(8,), likelihood="gaussian"),
    "factor analysis": Architecture(
        latent=3, encoder="exact", decoder="linear", likelihood="gaussian"
    ),
}


@pytest.mark.timeout(600)  # convolutions take half a minute of a processor that has no other work
@pytest.mark.parametrize("member", FAMILY)
def test_the_truth_is_like_a_draw_of_every_network_and_likelihood(member: str):
    """The ranks are as even of one layer or two, of any network, of binary and real pixels."""
    images = FEW if member == LARGE else IMAGES
    way, parts = _weighted("laplace", particles=128), FAMILY[member]

    assert _calibration(way, seed=1, images=images, architecture=parts) > 1e-3


@pytest.mark.parametrize("member", ["two layers", "real pixels"])
def test_the_truth_is_like_the_draws_of_chains(member: str):
    """So are those of annealed chains."""
    assert _calibration(_weighted("annealed"), seed=1, architecture=FAMILY[member]) > 1e-3


def test_draws_without_weights_are_not_calibrated():
    """The test has power: draws from the proposal itself fail it."""
    assert _calibration(_unweighted, seed=1) < 1e-4
