"""The algebra of weights against one pass, counting and exact distributions."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, genpareto
from torch import Tensor

from model.noise import Noise
from model.weights import (
    RELIABLE_PARETO_K,
    Mean,
    Slots,
    WeightSums,
    effective_sample_size,
    log_mean_exp,
    normalise,
    pareto_k,
    resample,
)

assert_agree = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    """Two rows of log-weights, and a way to cut them into blocks."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    log_weight = st.floats(-60, 60)
    rows = draw(st.lists(log_weight, min_size=2 * sum(sizes), max_size=2 * sum(sizes)))
    return torch.tensor(rows, dtype=torch.float64).reshape(2, -1), sizes


def _sums(log_weights: Tensor, sizes: list[int] | None = None) -> WeightSums:
    sums = WeightSums.empty(len(log_weights), particles=log_weights.shape[-1], like=log_weights)
    for block in log_weights.split(sizes or [log_weights.shape[-1]], dim=-1):
        sums = sums.update(block)
    return sums


@given(splits())
def test_sums_do_not_depend_on_the_blocks(case: tuple[Tensor, list[int]]):
    """Any split of the particles gives the sums of one pass, which are those of the formulas."""
    log_w, sizes = case
    sums = _sums(log_w, sizes)
    w = (log_w - log_w.amax(-1, keepdim=True)).exp()
    ess = w.sum(-1).square() / w.square().sum(-1)
    error = (1 / ess - 1 / log_w.shape[-1]).clamp(min=0).sqrt()

    assert sums.particles == log_w.shape[-1]
    assert_agree(sums.log_mean, log_mean_exp(log_w))
    torch.testing.assert_close(sums.effective_sample_size, ess, rtol=1e-11, atol=0)
    torch.testing.assert_close(effective_sample_size(log_w), ess, rtol=1e-11, atol=0)
    assert_agree(sums.standard_error.square(), error.square())
    torch.testing.assert_close(sums.largest, _sums(log_w).largest, rtol=0, atol=0)
    torch.testing.assert_close(
        sums.pareto_k, _sums(log_w).pareto_k, rtol=0, atol=0, equal_nan=True
    )


@given(splits())
def test_the_mean_does_not_depend_on_the_blocks(case: tuple[Tensor, list[int]]):
    """Any split of the particles gives the weighted mean Σ w̃ v, of vectors of any shape."""
    log_w, sizes = case
    vectors = Noise(0).normal(*log_w.shape, 2, 3, like=log_w)
    sums, mean = _sums(log_w[:, :0], [0]), Mean()
    for block, part in zip(log_w.split(sizes, -1), vectors.split(sizes, 1), strict=True):
        share = sums.share(block)
        sums, mean = sums.update(block), mean.update(block, part, share)

    expected = (normalise(log_w)[..., None, None] * vectors).sum(1)
    assert_agree(mean.value, expected)


@given(splits())
def test_the_effective_sample_size_is_between_one_and_the_particles(
    case: tuple[Tensor, list[int]],
):
    """It is 1 ≤ (Σw)²/Σw² ≤ K."""
    log_w, sizes = case
    ess = _sums(log_w, sizes).effective_sample_size

    assert (ess >= 1 - 1e-9).all()
    assert (ess <= log_w.shape[-1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_equal_weights_are_as_good_as_draws_from_the_target(level: float):
    """Their effective sample size is K, their error 0, their mean and tail exact."""
    sums = _sums(torch.full((1, 100), level, dtype=torch.float64), [60, 40])

    torch.testing.assert_close(sums.log_mean.item(), level)
    torch.testing.assert_close(sums.effective_sample_size.item(), 100.0)
    assert sums.standard_error.item() < 1e-5
    assert sums.pareto_k.item() == 0


def test_the_standard_error_is_that_of_the_logarithm_of_a_mean():
    """Over repeats the spread of log p̂ is the error that each of them claims."""
    log_w = Noise(1).normal(4000, 200, like=torch.zeros((), dtype=torch.float64)) / 2
    sums = _sums(log_w)
    spread, claimed = sums.log_mean.std(), sums.standard_error.square().mean().sqrt()

    assert abs(spread / claimed - 1) < 4 / math.sqrt(2 * 4000)


SPLITS = [(6,), (1, 5), (2, 2, 2), (1,) * 6]


def _chosen(log_weights: Tensor, sizes: tuple[int, ...], draws: int, *, seed: int = 2) -> Tensor:
    """Which particle each slot holds in the end."""
    places = torch.arange(log_weights.shape[-1], dtype=torch.float64)[None, :, None]
    sums = WeightSums.empty(1, particles=6, like=log_weights)
    slots = Slots.empty(1, draws, 1, like=log_weights)
    blocks = zip(log_weights.split(sizes, -1), places.split(sizes, 1), strict=True)
    for index, (block, latents) in enumerate(blocks):
        uniforms = Noise(seed).at(index).uniform(1, draws, 2, like=log_weights)
        slots = slots.update(block, latents, sums.share(block), uniforms)
        sums = sums.update(block)
    return slots.chosen.flatten().long()


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_a_slot_holds_each_particle_with_its_weight(sizes: tuple[int, ...]):
    """For any split into blocks, slot draws have P(k) = w̃_k, the last block and first alike."""
    w = torch.tensor([[4.0, 1.0, 0.5, 2.0, 0.1, 3.0]], dtype=torch.float64)
    counts = _chosen(w.log(), sizes, 20_000).bincount(minlength=6)

    assert chisquare(counts, (20_000 * w / w.sum())[0]).pvalue > 1e-3


def test_slots_are_independent():
    """Pairs of slots agree as often as two draws with replacement do."""
    w = torch.tensor([[4.0, 1.0, 0.5, 2.0, 0.1, 3.0]], dtype=torch.float64)
    chosen = _chosen(w.log(), (2, 2, 2), 40_000).reshape(-1, 2)
    agree = (w / w.sum()).square().sum().item()
    found = (chosen[:, 0] == chosen[:, 1]).double().mean().item()

    assert abs(found - agree) < 4 * math.sqrt(agree * (1 - agree) / len(chosen))


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("height", [20.0, 800.0])
@pytest.mark.parametrize("winner", [0, 3, 5])
def test_a_dominant_particle_fills_every_slot(winner: int, height: float, sizes: tuple[int, ...]):
    """Draws are with replacement: one weight far above the others gives every draw."""
    log_w = torch.zeros(1, 6, dtype=torch.float64)
    log_w[0, winner] = height

    assert (_chosen(log_w, sizes, 50) == winner).all()


def test_resampling_follows_the_weights():
    """A uniform number u picks the particle in whose part of the cumulative weight it falls."""
    log_w = torch.tensor([[0.0, math.log(2.0), -torch.inf, 0.0]])
    uniforms = torch.tensor([[0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24]])

    assert resample(log_w, uniforms).tolist() == [[0, 0, 1, 1, 3, 3]]


def test_a_particle_of_no_weight_is_never_picked():
    """Not even by the smallest and largest numbers below one."""
    log_w = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    uniforms = torch.tensor([[0.0, 0.5, 1 - 2**-24]])

    assert resample(log_w, uniforms).tolist() == [[1, 1, 1]]


def _pareto(k: float, *, rows: int = 40, tail: int = 1000) -> Tensor:
    """The largest log-weights when excesses above 1 are exactly generalised Pareto."""
    uniforms = Noise(7).uniform(rows, tail, like=torch.zeros((), dtype=torch.float64))
    excess = torch.from_numpy(genpareto.ppf(uniforms.numpy(), k))
    weights = torch.cat([1 + excess, torch.ones(rows, 1, dtype=torch.float64)], -1)
    return weights.log().sort(-1, descending=True).values


@pytest.mark.parametrize("k", [0.2, 0.7, 1.2])
def test_the_shape_of_a_pareto_tail_is_recovered(k: float):
    """k̂ is k within four of its asymptotic errors (1 + k)/√tail, and the prior's pull to 1/2."""
    found = pareto_k(_pareto(k))
    error = (1 + k) / math.sqrt(1000)

    assert abs(found.mean().item() - k) < 4 * error / math.sqrt(len(found)) + 0.01
    assert (found - k).abs().max() < 4.5 * error


def test_a_heavier_tail_has_a_larger_shape():
    """k̂ grows with k row by row, across the limit of what is believed."""
    shapes = torch.stack([pareto_k(_pareto(k)) for k in (0.2, 0.45, 0.7, 0.95, 1.2)])

    assert (shapes.diff(dim=0) > 0).all()
    assert (shapes[0] < RELIABLE_PARETO_K).all()
    assert (shapes[-1] > RELIABLE_PARETO_K).all()


def test_the_shape_does_not_depend_on_the_weights_scale():
    """Adding a constant to the log-weights changes nothing that matters."""
    log_w = _pareto(0.7)

    torch.testing.assert_close(pareto_k(log_w + 1e4), pareto_k(log_w), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("particles", [1, 5, 24])
def test_too_few_particles_have_no_shape(particles: int):
    """With fewer than five weights in the tail k̂ is NaN, which is not reliable."""
    sums = _sums(Noise(0).normal(3, particles, like=torch.zeros((), dtype=torch.float64)))

    assert sums.pareto_k.isnan().all()


EXTREMES = {
    "one far above": [1e4] + [0.0] * 99,
    "one far below": [-1e4] + [0.0] * 99,
    "evenly between": torch.linspace(-1e4, 1e4, 100).tolist(),
    "half and half": [1e4] * 50 + [-1e4] * 50,
    "few at the top": [1e4] * 3 + [-1e4] * 97,
    "ties within the tail": [2.0] * 10 + [1.0] * 90,
}


@pytest.mark.parametrize("log_weights", EXTREMES.values(), ids=EXTREMES.keys())
def test_extreme_weights_have_finite_diagnostics(log_weights: list[float]):
    """Neither overflow nor 0/0 reaches the mean, its error, the sample size or the shape."""
    sums = _sums(torch.tensor([log_weights], dtype=torch.float64), [30, 70])

    for number in (
        sums.log_mean,
        sums.standard_error,
        sums.effective_sample_size,
        sums.pareto_k,
    ):
        assert number.isfinite().all()
    assert 1 - 1e-9 <= sums.effective_sample_size.item() <= 100 + 1e-9


def test_a_dominant_weight_is_not_reliable():
    """One particle that carries all the weight shows in the shape of the tail."""
    log_w = 30 * Noise(3).normal(8, 1000, like=torch.zeros((), dtype=torch.float64))

    assert (_sums(log_w).pareto_k > RELIABLE_PARETO_K).all()
