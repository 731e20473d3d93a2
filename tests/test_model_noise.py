"""Randomness that depends on its purpose alone, from one number to a whole answer."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.imputation import Completions, impute
from model.likelihood import BLOCK, PROPOSALS, blocks
from model.masks import Incomplete
from model.noise import MAX_SEED, Noise, NoisePerImage, Source, image_seed
from model.stages import finish
from tests.conftest import fixed_model, some_incomplete, standard_errors

LIKE = torch.zeros((), dtype=torch.float64)

SOURCES: dict[str, Callable[[int], Source]] = {
    "batch": Noise,
    "image": lambda seed: NoisePerImage.of(seed, range(4)),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_a_purpose_always_gets_the_same_numbers(make: Callable[[int], Source]):
    """Two sources of one seed and path agree, whatever was drawn in between."""
    first, second = make(3), make(3)
    second.normal(4, 7, like=LIKE)

    for kind in ("normal", "uniform"):
        numbers = [getattr(s.at("a", 1), kind)(4, 5, like=LIKE) for s in (first, second)]
        assert torch.equal(*numbers)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_different_purposes_get_different_numbers(make: Callable[[int], Source]):
    """No two of the seeds, paths and images share a number."""
    sources = [make(seed).at(*path) for seed in (0, 1) for path in ((), ("a",), ("b",), ("a", 1))]
    sources.append(make(0).at("a").at(2))
    numbers = torch.cat([s.normal(4, 50, like=LIKE).flatten() for s in sources])

    assert len(numbers.unique()) >= len(numbers) - 2


def test_paths_add_up():
    """at("a").at(1) is at("a", 1)."""
    assert Noise(0).at("a").at(1) == Noise(0).at("a", 1)
    assert NoisePerImage.of(0, [2]).at("a").at(1) == NoisePerImage.of(0, [2]).at("a", 1)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_numbers_have_the_distribution_of_their_name(make: Callable[[int], Source]):
    """Normal ones have mean 0 and variance 1, uniform ones lie in [0, 1) with mean 1/2."""
    normal = make(0).normal(4, 5000, like=LIKE).flatten()
    uniform = make(0).uniform(4, 5000, like=LIKE).flatten()

    assert standard_errors(normal, 0.0).abs() < 4
    assert standard_errors(normal.square(), 1.0).abs() < 4
    assert standard_errors(uniform, 0.5).abs() < 4
    assert standard_errors((uniform - 0.5).square(), 1 / 12).abs() < 4
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_an_image_has_its_numbers_in_any_batch():
    """Alone, among others and in another order, an image's numbers are the same."""
    together = NoisePerImage.of(0, [0, 1, 2]).at("a").normal(3, 4, 5, like=LIKE)
    other = NoisePerImage.of(0, [2, 0]).at("a").normal(2, 4, 5, like=LIKE)
    alone = NoisePerImage.of(0, [1]).at("a").normal(1, 4, 5, like=LIKE)

    assert torch.equal(other, together[[2, 0]])
    assert torch.equal(alone[0], together[1])


def test_an_images_seed_asks_for_it_alone():
    """With the seed of an image a request of it alone gets what it got among others."""
    among = NoisePerImage.of(7, [3]).normal(1, 9, like=LIKE)
    alone = NoisePerImage.of(image_seed(7, 3), [0]).normal(1, 9, like=LIKE)

    assert torch.equal(among, alone)
    assert image_seed(7, 0) == 7
    assert all(0 <= image_seed(7, i) <= MAX_SEED for i in range(200))


PREFIXES = {"whole blocks": (BLOCK, 2 * BLOCK), "a part of a block": (100, 192), "one": (1, 70)}


def _joined(images: Incomplete, particles: int, proposal: str) -> tuple[Tensor, Tensor, Tensor]:
    noise = NoisePerImage.of(0, range(len(images)))
    parts = list(blocks(fixed_model(), images, noise, particles=particles, proposal=proposal))
    return (
        torch.cat([p.latents for p in parts], 1),
        torch.cat([p.parameters for p in parts if p.parameters is not None], 1),
        torch.cat([p.log_weights for p in parts], 1),
    )


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(("few", "many"), PREFIXES.values(), ids=PREFIXES.keys())
def test_more_particles_begin_with_the_same_ones(few: int, many: int, proposal: str):
    """A larger request's particles begin with the smaller one's, to the bit."""
    images = some_incomplete(3)

    for short, long in zip(
        _joined(images, few, proposal), _joined(images, many, proposal), strict=True
    ):
        assert (short.shape[1], long.shape[1]) == (few, many)
        assert torch.equal(short, long[:, :few])


def _impute(images: Incomplete, indices: list[int], proposal: str) -> Completions:
    noise = NoisePerImage.of(0, indices)
    return finish(impute(fixed_model(), images, noise, particles=100, draws=4, proposal=proposal))


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_same_request_gets_the_same_bytes(proposal: str):
    """An image that is imputed twice alone comes back the same to the bit."""
    images = some_incomplete(1)
    first, second = (_impute(images, [0], proposal) for _ in range(2))

    for name in ("mean", "std", "draws"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    for name in ("value", "standard_error", "effective_sample_size", "pareto_k"):
        one, other = (getattr(c.log_likelihood, name) for c in (first, second))
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_neighbours_change_nothing(proposal: str):
    """An image among others gets the draws that it gets alone, and the numbers to rounding."""
    images = some_incomplete(5)
    together = _impute(images, [0, 1, 2, 3, 4], proposal)
    for index in range(5):
        alone = _impute(images[index : index + 1], [index], proposal)

        assert torch.equal(alone.draws[0], together.draws[index])
        torch.testing.assert_close(alone.mean[0], together.mean[index], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            alone.log_likelihood.value[0],
            together.log_likelihood.value[index],
            rtol=1e-10,
            atol=1e-10,
        )


def test_another_seed_gives_another_answer():
    """The draws of two seeds differ."""
    images = some_incomplete(5)

    assert not torch.equal(
        _impute(images, [0, 1, 2, 3, 4], "own").draws,
        _impute(images, [5, 6, 7, 8, 9], "own").draws,
    )
