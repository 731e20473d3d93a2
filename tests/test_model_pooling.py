"""Rubin's rules against a textbook's numbers, and what they promise of intervals."""

import math

import pytest
import torch
from scipy.stats import t

from model.imputation import impute
from model.noise import Noise, NoisePerImage
from model.pooling import pool
from model.stages import finish
from tests.test_model_factor_analysis import holes, linear_model

LIKE = torch.zeros((), dtype=torch.float64)


def test_the_parts_are_rubins():
    """By hand: Q̄ = 2, Ū = 1, B = 1 of three completions, so that T = 7/3 and r = 4/3."""
    found = pool(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.5]))

    assert (found.value, found.within, found.between) == (2, 1, 1)
    assert found.standard_error**2 == pytest.approx(7 / 3)
    assert found.missing_information == pytest.approx(4 / 7)
    assert found.degrees_of_freedom == pytest.approx(2 * (1 + 3 / 4) ** 2)


def test_few_complete_data_leave_few_degrees_of_freedom():
    """They are fewer than those of the complete data, as Barnard and Rubin (1999) have them."""
    q, u = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.5])
    few = pool(q, u, complete_freedom=10.0).degrees_of_freedom
    observed = 11 / 13 * 10 * 3 / 7

    assert few == pytest.approx(1 / (1 / (2 * 1.75**2) + 1 / observed))
    assert few < 10


def test_where_nothing_is_missing_the_analysis_is_that_of_one_image():
    """Equal completions add no variance, and infinitely many degrees of freedom."""
    found = pool(torch.full((4, 2), 3.0), torch.full((4, 2), 0.25))

    assert found.standard_error.tolist() == [0.5, 0.5]
    assert found.missing_information.tolist() == [0, 0]
    assert (found.degrees_of_freedom == math.inf).all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of the mean pixel of factor analysis' images, 90 % intervals hold about 90 %."""
    model = linear_model()
    truth = model.sample(2000, Noise(1))
    images = holes(model, 2000)
    noise = NoisePerImage.of(0, range(2000))
    draws = finish(impute(model, images, noise, particles=64, draws=10)).draws
    means = draws.flatten(2).mean(-1).T
    measured = 0.3
    off = measured * Noise(2).at("measured").normal(2000, like=LIKE)
    found = pool(means + off, torch.full_like(means, measured**2))
    reach = torch.from_numpy(t.ppf(0.95, found.degrees_of_freedom.numpy())) * found.standard_error
    held = (found.value - truth.flatten(1).mean(-1)).abs() < reach

    assert held.double().mean() == pytest.approx(0.9, abs=0.02)


def test_one_completion_says_nothing_of_what_is_missing():
    """It is refused, with what was expected and what came."""
    with pytest.raises(ValueError, match="at least 2 completions; got 1"):
        pool(torch.ones(1), torch.ones(1))
