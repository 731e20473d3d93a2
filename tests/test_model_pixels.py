"""The sums over pixels in machine code against the same sums in Python."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.masks import Incomplete
from model.noise import Noise
from model.pixels import Bernoulli, bernoulli_sums
from tests.conftest import fixed_model

assert_agree = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
LIKE = torch.zeros((), dtype=torch.float64)


def _case(pixels: int, *, like: Tensor = LIKE, scale: float = 3.0) -> tuple[Tensor, ...]:
    """Logits of five particles of three images, with what was seen and where."""
    logits = scale * Noise(1).normal(3, 5, pixels, like=like)
    observed = (Noise(2).uniform(3, pixels, like=like) < 0.6).to(like)
    return logits, (Noise(3).uniform(3, pixels, like=like) < 0.4) * observed, observed


@pytest.mark.skipif(shutil.which("g++") is None, reason="There is no C++ compiler.")
@pytest.mark.timeout(300)  # the first time on a machine that has other work
def test_the_compiled_sums_are_those_of_the_function():
    """In float64 machine code agrees to 1e-10, of near logits and of far ones."""
    logits, seen, observed = _case(784)
    logits[:, 0] *= 100
    compiled = torch.compile(bernoulli_sums, dynamic=False, fullgraph=True)
    with torch.compiler.set_stance("default"):
        compiled(logits, seen, observed)
    with torch.compiler.set_stance("fail_on_recompile"):  # so that it is no fall-back
        found = compiled(logits, seen, observed)

    assert_agree(found, bernoulli_sums(logits, seen, observed))


@pytest.mark.parametrize("pixels", [1, 7, 101, 784, 1009])
def test_the_sums_are_those_of_torch(pixels: int):
    """Whatever the number of pixels, a prime too, they are the log-density and minus entropy."""
    logits, seen, observed = _case(pixels)
    by_torch = torch.distributions.Bernoulli(logits=logits)
    density, expected = bernoulli_sums(logits, seen, observed)

    here = observed[:, None]
    assert_agree(density, (here * by_torch.log_prob(seen[:, None].expand_as(logits))).sum(-1))
    assert_agree(expected, -((1 - here) * by_torch.entropy()).sum(-1))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_products_of_probabilities_fit_in_single_precision(scale: float):
    """Multiplying before the logarithm loses nothing: float32 has float64's leading digits."""
    logits, seen, observed = _case(784, like=LIKE.float(), scale=scale)
    single = bernoulli_sums(logits, seen, observed)
    double = bernoulli_sums(logits.double(), seen.double(), observed.double())

    for one, two in zip(single, double, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1e-2)


def test_half_precision_is_summed_in_single_precision():
    """Logits in bf16 have the sums of the same numbers in fp32, with a gradient or without."""
    logits = Noise(1).normal(2, 5, 1, 28, 28, like=LIKE.float()).bfloat16()
    values, observed = logits[:, 0].float() > 0, logits[:, 1] > 0
    images = Incomplete.hide(values.float(), observed)
    wide = Bernoulli().log_densities(logits.float(), images)

    assert all(map(torch.equal, Bernoulli().log_densities(logits, images), wide))
    for likelihood in (Bernoulli(), Bernoulli(bernoulli_sums)):
        with torch.set_grad_enabled(likelihood.compiled is None):
            density = likelihood.log_density(logits, images)
            assert density.dtype == torch.float32
            assert torch.equal(density, likelihood.log_density(logits.float(), images))


def test_an_image_without_a_hole_or_with_nothing_else():
    """The sum over no pixel is zero, whether none was seen or none is missing."""
    logits = Noise(1).normal(2, 5, 1, 3, 3, like=LIKE)
    values = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    observed = torch.tensor([True, False])[:, None, None, None].expand_as(values)
    density, expected = Bernoulli().log_densities(logits, Incomplete.hide(values, observed))

    assert (expected[0] == 0).all()
    assert (density[1] == 0).all()
    assert (density[0] < 0).all()
    assert (expected[1] < 0).all()


@pytest.mark.parametrize("lacking", ["compiler", "header"])
def test_without_a_compiler_the_plain_sums_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str
):
    """Neither a missing compiler nor missing headers of Python keep a model from being used."""
    if lacking == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        monkeypatch.setattr("sysconfig.get_path", lambda _name: str(tmp_path))

    assert fixed_model().compiled().likelihood.compiled is None
