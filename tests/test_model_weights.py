"""The algebra of weights against one pass, counting and exact distributions."""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare, genpareto
from torch import Tensor

from model.noise import Noise
from model.weights import (
    RELIABLE_PARETO_K,
    Mean,
    Slots,
    Thinned,
    WeightSums,
    effective_sample_size,
    log_add,
    log_mean_exp,
    normalise,
    pareto_k,
    resample,
    thin,
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


def test_sums_of_many_images_have_the_bits_of_each():
    """How many are added at once changes nothing, and nothing added to nothing is nothing."""
    one, other = 3 * Noise(0).normal(2, 2000, 16, like=torch.zeros(()).double()) - 15
    nothing = torch.tensor([-math.inf], dtype=torch.float64)

    together = log_add(one, other)

    alone = [
        log_add(a[None], b[None]) for a, b in zip(one.flatten(), other.flatten(), strict=True)
    ]
    assert torch.equal(together.flatten(), torch.cat(alone))
    assert torch.equal(
        torch.stack([log_add(a, b) for a, b in zip(one, other, strict=True)]), together
    )
    assert_agree(together, torch.logaddexp(one, other))
    assert log_add(nothing, nothing) == nothing
    assert log_add(nothing, one[0, :1]) == one[0, 0]


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


# Thinning.

DENORMAL = 2.0**-1074
GRID = 97
"""Uniforms at even distances: of an arc of the circle they hit its share, up to one of them."""

SIZES: dict[str, list[float]] = {
    "various": [0.3, 0.05, 0.6, 0.01, 0.2, 0.04],
    "equal": [0.1] * 8,
    "equal to one": [1.0] * 8,
    "with zeros": [0.0, 0.3, 0.0, 0.0, 0.05, 0.2, 0.0],
    "two of them, above one": [1.2, 0.8],
    "all above one": [5.0, 7.0, 30.0, 4.0, 2.0, 9.0],
    "one dominant": [1e-3, 1e9, 2e-3, 3e-3, 1e-3],
    "one alone": [0.0, 0.0, 0.4, 0.0],
    "each a tenth of the last": [10.0**-k for k in range(12)],
    "tiny": [1e-300, 3e-300, 0.0, 2e-300, 1e-300],
    "tiny beside large": [1e-300, 0.5, 0.2, 1e-300, 0.4],
    "denormal": [DENORMAL, 0.0, 3 * DENORMAL, DENORMAL, 2 * DENORMAL, DENORMAL],
}


def _thinned(sizes: Tensor, count: int, *, grid: int = GRID) -> list[Thinned]:
    """The rows for every uniform number of the grid."""
    places = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    return [thin(sizes, count, place[None]) for place in places]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_thinned_rows_stand_for_all(sizes: list[float], count: int):
    """The mean of Σ scale·f over uniform numbers is Σ f for any f of the sizes' magnitude.

    It is so row by row, with f a multiple of the row's size, up to what one number of the grid
    brings: scale·size, which is at most the sizes' mean over the count.
    """
    size = torch.tensor(sizes, dtype=torch.float64)
    f = size / size.max()
    total = torch.zeros_like(f)
    for rows in _thinned(size, count):
        total.index_add_(0, rows.index, rows.scale * f[rows.index] / GRID)

    assert (total - f).abs().max() <= f.sum() / count / GRID + 1e-12


@pytest.mark.parametrize("count", [8, 9, 1000])
def test_nothing_is_thinned_where_there_is_room_for_all(count: int):
    """With as many rows as there are, each is there once, in order and for itself alone."""
    size = torch.tensor([0.3, 0.0, 1e-300, 7.0, 0.0, 0.2, 1e9, 0.1], dtype=torch.float64)
    rows = thin(size, count, torch.tensor([0.3]))

    assert rows.index.tolist() == list(range(8))
    assert rows.scale.tolist() == [1.0] * 8


CERTAIN: dict[str, tuple[list[float], int, set[int]]] = {
    "one": ([1.0, 1.0, 100.0, 1.0, 1.0], 2, {2}),
    "a second once the first is set apart": ([1.0, 10.0, 1.0, 100.0, 1.0, 1.0], 3, {1, 3}),
    "one after another": ([4.0**k for k in range(9)], 5, {5, 6, 7, 8}),
    "all that are there": ([0.0, 3.0, 0.0, 2.0, 0.0], 2, {1, 3}),
}


@pytest.mark.parametrize("unit", [2.0**-900, 2.0**-20, 1.0, 2.0**20])
@pytest.mark.parametrize(("sizes", "count", "certain"), CERTAIN.values(), ids=CERTAIN.keys())
def test_rows_that_are_certain_are_always_there(
    sizes: list[float], count: int, certain: set[int], unit: float
):
    """A row whose share of the count is one or more stands for itself, once, in any unit."""
    for rows in _thinned(unit * torch.tensor(sizes, dtype=torch.float64), count, grid=17):
        picked = dict(zip(rows.index.tolist(), rows.scale.tolist(), strict=True))

        assert len(picked) == count
        assert [picked.get(row) for row in certain] == pytest.approx([1.0] * len(certain))


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 1e30)), min_size=2, max_size=20),
    st.integers(1, 19),
    st.floats(0, 1, exclude_max=True),
)
def test_there_are_so_many_rows_as_were_asked_for(sizes: list[float], count: int, uniform: float):
    """They are exactly `count`, have a size, and stand for a finite number of rows each."""
    assume(any(sizes) and count < len(sizes))
    size = torch.tensor(sizes, dtype=torch.float64)
    rows = thin(size, count, torch.tensor([uniform], dtype=torch.float64))

    assert len(rows.index) == len(rows.scale) == count
    assert (size[rows.index] > 0).all()
    assert (rows.scale.isfinite() & (rows.scale > 0)).all()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, 1 - 2**-53])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_row_of_no_size_is_never_picked(sizes: list[float], uniform: float):
    """Not even by the smallest and largest numbers below one, first or last as it may be."""
    size = torch.tensor([0.0, *sizes, 0.0, 0.0], dtype=torch.float64)
    rows = thin(size, 3, torch.tensor([uniform], dtype=torch.float64))

    assert (size[rows.index] > 0).all()
    assert rows.scale.isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_rows_that_are_all_nothing_stand_for_nothing(count: int):
    """Where every size is zero so is every f, and 0·scale is zero, never NaN."""
    rows = thin(torch.zeros(7, dtype=torch.float64), count, torch.tensor([0.3]))

    assert len(rows.index) == count
    assert (0.0 * rows.scale == 0).all()
