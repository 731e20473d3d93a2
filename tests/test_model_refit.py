"""Refitted encoders: tighter bounds on the same decoder, and completions to learn from."""

import torch
from scipy.stats import chisquare
from torch import Tensor

from model.latent import LatentVariableModel
from model.likelihood import score
from model.masks import Incomplete
from model.noise import Noise
from model.objectives import OBJECTIVES
from model.refit import completed, polish, tightened
from model.stages import finish
from tests.conftest import Quadrature, copies, every_image, fixed_model, some_incomplete

MISS = OBJECTIVES["miss-iwem"]


def _bound(model: LatentVariableModel, truth: Tensor) -> Tensor:
    """The mean of IWAE's bound with 64 particles of the model's own encoder."""
    images = Incomplete.complete(truth)
    scores = finish(score(model, images, Noise(8), particles=64, proposal="own"))
    return scores.log_likelihood.value


def test_a_tightened_encoder_bounds_the_same_decoder_more_closely():
    """The bound rises towards log p(x) and stays below it; the decoder is the same to the bit."""
    model, truth = fixed_model(), some_incomplete(40).values
    tight = finish(tightened(model, Incomplete.complete(truth), Noise(0), steps=150))
    exact = Quadrature.of(model).log_likelihood(Incomplete.complete(truth)).mean()
    before, after = _bound(model, truth).mean(), _bound(tight, truth).mean()

    assert before < after - 0.01
    assert after < exact + 0.05
    assert exact - after < 0.7 * (exact - before)
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, tight.decoder.state_dict()[name])


def test_completions_are_draws_from_the_conditional():
    """With many particles the holes are filled by p(x_m | x_o), and what was seen stays."""
    model, count = fixed_model(image_shape=(1, 2, 2)), 4000
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().reshape(1, 1, 2, 2)
    seen = torch.tensor([[True, True], [False, False]]).reshape(1, 1, 2, 2)
    images = copies(Incomplete.hide(truth, seen), count)
    filled = completed(MISS, model, images, Noise(3), particles=200)
    codes = (filled.values.flatten(1) @ torch.tensor([0.0, 0.0, 2.0, 1.0]).double()).long()
    whole = every_image(2, 2)
    agree = whole[(whole[:, :, 0] == truth[:, :, 0]).flatten(1).all(1)]
    p = Quadrature.of(model).log_likelihood(Incomplete.complete(agree)).softmax(0)

    assert filled.observed.all()
    assert torch.equal(filled.values[:, :, 0], images.values[:, :, 0])
    assert chisquare(codes.bincount(minlength=4), count * p).pvalue > 1e-3


def test_a_polished_encoder_has_learnt_from_incomplete_images_alone():
    """The bound of complete images rises although none was seen, and the decoder stays."""
    model, images = fixed_model(), some_incomplete(60)
    truth = fixed_model().sample(60, Noise(5))

    def batch(noise: Noise) -> Incomplete:
        picked = torch.randint(60, (20,), generator=noise.at("batch").generator())
        return images[picked]

    refit = polish(model, MISS, batch, Noise(0), steps=150)
    while refit.taken < refit.steps:
        refit.step()

    assert _bound(model, truth).mean() < _bound(refit.model, truth).mean() - 0.01
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(weight, refit.model.decoder.state_dict()[name])
