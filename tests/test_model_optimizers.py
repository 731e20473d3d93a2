"""Optimisers: which weights each moves, and that they go on from what they kept."""

import pytest
import torch
from torch import Tensor, nn

from model.latent import Architecture
from model.noise import Noise
from model.optimizers import OPTIMIZERS, give_moments, moments, optimizer

RATE = 1e-2
ONE = Architecture(hidden=(16, 12), latent=4)
TWO = Architecture(hidden=(16,), latent=4, upper=3, upper_hidden=(6,))
CONVOLUTIONS = Architecture(encoder="gated-conv", decoder="gated-conv", hidden=(16,), latent=4)
LINEAR = Architecture(decoder="linear", hidden=(16,), latent=4)
BETWEEN = {
    "mlp": (
        ONE,
        {
            "encoder.layers.2.weight",
            "encoder.layers.4.weight",
            "decoder.layers.0.weight",
            "decoder.layers.2.weight",
        },
    ),
    "mlp, two layers": (
        TWO,
        {
            "encoder.layers.2.weight",
            "upper_encoder.layers.0.weight",
            "upper_encoder.layers.2.weight",
            "decoder.layers.0.weight",
            "prior.network.layers.0.weight",
            "prior.network.layers.2.weight",
        },
    ),
    "gated-conv": (
        CONVOLUTIONS,
        {"encoder.out.weight", "decoder.dense.0.layer.weight", "decoder.dense.1.layer.weight"},
    ),
    "linear": (LINEAR, {"encoder.layers.2.weight"}),
}


def _steps(model: nn.Module, by: torch.optim.Optimizer, numbers: range) -> dict[str, Tensor]:
    """How far every weight is moved by some steps with gradients of these numbers."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for number in numbers:
        for index, weight in enumerate(model.parameters()):
            weight.grad = Noise(number).at("gradient", index).normal(*weight.shape, like=weight)
        by.step()
    return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("architecture", "between"), BETWEEN.values(), ids=BETWEEN.keys())
def test_muon_moves_what_is_between_layers(architecture: Architecture, between: set[str]):
    """Its moves have singular values that are about one; Adam's first are as long as the rate."""
    model = architecture.build(Noise(0))
    by = optimizer(model, learning_rate=RATE, weight_decay=0.0, name="muon")
    moves = _steps(model, by, range(1))

    for name, move in moves.items():
        if name not in between:
            torch.testing.assert_close(move.abs(), torch.full_like(move, RATE), rtol=0.01, atol=0)
            continue
        values = torch.linalg.svdvals(move) / (0.2 * RATE * max(move.shape) ** 0.5)
        assert values.min() > 0.5
        assert values.max() < 1.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rate_of_nothing_moves_nothing(name: str):
    """The rate that a schedule sets is that of every weight."""
    model = ONE.build(Noise(0))
    by = optimizer(model, learning_rate=RATE, weight_decay=0.1, name=name)
    for group in by.param_groups:
        group["lr"] = 0.0

    assert all(move.abs().max() == 0 for move in _steps(model, by, range(2)).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_decay_beside_their_moves(name: str):
    """Where nothing is to be learned every weight shrinks by the rate times the decay."""
    model = ONE.build(Noise(0))
    by = optimizer(model, learning_rate=RATE, weight_decay=0.1, name=name)
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    by.step()

    for was, weight in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(weight.detach(), (1 - RATE * 0.1) * was)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_goes_on_from_what_another_kept(name: str):
    """With its moments the next steps have the same bits."""
    whole, parted = ONE.build(Noise(0)), ONE.build(Noise(0))
    first, second, third = (
        optimizer(model, learning_rate=RATE, weight_decay=0.0, name=name)
        for model in (whole, parted, parted)
    )
    _steps(whole, first, range(4))
    _steps(parted, second, range(2))
    give_moments(third, moments(second))
    _steps(parted, third, range(2, 4))

    for one, other in zip(whole.parameters(), parted.parameters(), strict=True):
        assert torch.equal(one, other)


def test_moments_are_numbered_as_torch_numbers_them():
    """States that were saved before there was a choice of optimisers are gone on with."""
    model = ONE.build(Noise(0))
    adam = optimizer(model, learning_rate=RATE, weight_decay=0.0)
    _steps(model, adam, range(1))
    state = adam.state_dict()["state"]

    assert moments(adam).keys() == {f"{i}.{key}" for i, of in state.items() for key in of}
