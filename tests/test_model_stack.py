"""A stack of models against the models that it is made of."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.latent import Architecture, LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise
from model.objectives import OBJECTIVES, Objective, ascend
from model.refinement import Refinement
from model.stack import NoisePerModel, stacked
from tests.conftest import small_model, some_incomplete

SEEDS = (3, 4, 5)
MISS = OBJECTIVES["miss-iwem"]
ROWS: dict[str, Objective] = {
    **OBJECTIVES,
    "three imputations, wake": replace(MISS, imputations=3, p_step="wake", first_pass=True),
    "dreg": replace(MISS, p_step="dreg"),
    "sampled": replace(MISS, m_step="sampled"),
    "refined": replace(MISS, svi=Refinement(steps=2, through=True)),
}


def _joined(parts: list[Incomplete]) -> Incomplete:
    return Incomplete(
        torch.cat([part.values for part in parts]), torch.cat([part.observed for part in parts])
    )


def _climbed(
    model: LatentVariableModel, objective: Objective, images: Incomplete, noise: object
) -> tuple[Tensor, dict[str, Tensor]]:
    for climb in objective.climbs:
        climbed = ascend(objective, model, images, noise, particles=9, alpha=0.4, climb=climb)  # pyright: ignore[reportArgumentType]
    return climbed.bound, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("upper", [0, 3])
@pytest.mark.parametrize("objective", ROWS.values(), ids=ROWS.keys())
def test_each_model_of_a_stack_climbs_as_it_would_alone(objective: Objective, upper: int):
    """Bounds and gradients of the stack are those of its models, whatever the objective."""
    if upper and objective is OBJECTIVES["vae-analytic"]:
        pytest.skip("two stochastic layers have no divergence in closed form")
    models = [small_model(seed=seed, upper=upper) for seed in SEEDS]
    images = [some_incomplete(4, seed=seed) for seed in SEEDS]
    noises = tuple(Noise(seed) for seed in SEEDS)
    alone = [
        _climbed(model, objective, part, noise)
        for model, part, noise in zip(models, images, noises, strict=True)
    ]

    bounds, gradients = _climbed(
        stacked([small_model(seed=seed, upper=upper) for seed in SEEDS]),
        objective,
        _joined(images),
        NoisePerModel(noises),
    )

    for index, (bound, own) in enumerate(alone):
        torch.testing.assert_close(bounds[index], bound)
        assert own.keys() == gradients.keys()
        for name, gradient in own.items():
            torch.testing.assert_close(gradients[name][index], gradient)


def test_convolutions_are_not_stacked():
    """Networks that are not fully connected are refused by what they are."""
    model = Architecture(encoder="gated-conv").build(Noise(0))

    with pytest.raises(TypeError, match="Expected fully connected layers to stack; got Conv2d"):
        stacked([model, model])
