r"""A refitted encoder: the decoder stays, and the proposal alone is trained on complete images.

An encoder that was trained on images with holes proposes what may lie behind them, and so too
widely for images without: their estimated log-likelihood is then a loose bound, not a bad model.
Two uses, which differ in the images:

- `tight` scores refit the encoder on the very images that are scored (Simkus and Gutmann,
  "Improving variational autoencoder estimation from incomplete data with mixture variational
  families", 2024), so that the bound says what the decoder can do;
- the `polish` of a model is by its own completions of the training images, which needs no
  complete image and so makes a better encoder to serve.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from model.latent import LatentVariableModel
from model.masks import Incomplete
from model.noise import Noise, Source
from model.objectives import Objective, ascend, iwae
from model.stages import Stages
from model.weights import resample

__all__ = ["Refit", "completed", "polish", "tightened"]

ZERO_FILLED = Objective(bound=iwae, steps=True, p_step="dreg")
"""What an encoder climbs on images as they are."""
PARTICLES, BATCH, LEARNING_RATE = 20, 100, 1e-3


class Refit:
    """The training of a copy's encoder, which may be left after each step and gone on with."""

    def __init__(
        self,
        model: LatentVariableModel,
        climb: Callable[[LatentVariableModel, Noise], None],
        noise: Noise,
        *,
        steps: int,
    ) -> None:
        self.model = deepcopy(model).requires_grad_(requires_grad=False)
        self.taken, self.steps = 0, steps
        self._climb, self._noise = climb, noise
        for parameter in self.model.phi():
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=LEARNING_RATE, fused=True)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The encoder's weights by their names in the model."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def step(self) -> None:
        """Takes one; there must be one left."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - self.taken / self.steps)
        self.optimizer.zero_grad()
        self._climb(self.model, self._noise.at("refit", self.taken))
        self.optimizer.step()
        self.taken += 1


def tightened(
    model: LatentVariableModel,
    images: Incomplete,
    noise: Noise,
    *,
    steps: int,
) -> Stages[LatentVariableModel]:
    """The model with an encoder that was trained for these very images."""

    def climb(fresh: LatentVariableModel, source: Noise) -> None:
        picked = torch.randint(len(images), (BATCH,), generator=source.at("batch").generator())
        _climb(ZERO_FILLED, fresh, images[picked], source)

    refit = Refit(model, climb, noise, steps=steps)
    while refit.taken < steps:
        refit.step()
        yield
    return refit.model.requires_grad_(requires_grad=False)


def polish(
    model: LatentVariableModel,
    objective: Objective,
    batch: Callable[[Noise], Incomplete],
    noise: Noise,
    *,
    steps: int,
) -> Refit:
    """The training of a model's encoder on incomplete images and on its completions of them."""

    def climb(fresh: LatentVariableModel, source: Noise) -> None:
        images = batch(source)
        complete = completed(objective, model, images, source.at("completed"))
        _climb(objective, fresh, images, source.at("incomplete"))
        _climb(ZERO_FILLED, fresh, complete, source.at("complete"))

    return Refit(model, climb, noise, steps=steps)


@torch.no_grad()
def completed(
    objective: Objective,
    model: LatentVariableModel,
    images: Incomplete,
    noise: Source,
    *,
    particles: int = 50,
) -> Incomplete:
    """The images with their holes filled by a draw from p(x_m | x_o), as complete ones."""
    proposal = objective.proposal(model, images, noise.at("proposal"))
    latents = proposal.draw(particles, noise.at("particles"))
    log_w = model.particles(images, proposal, latents).log_weights
    uniforms = noise.at("pick").uniform(len(images), 1, like=log_w)
    picked = resample(log_w, uniforms)[..., None].expand(-1, -1, latents.shape[-1])
    filled = model.impute(images, latents.gather(1, picked), noise.at("filling"))
    return Incomplete.complete(filled[:, 0])


def _climb(
    objective: Objective, model: LatentVariableModel, images: Incomplete, noise: Noise
) -> None:
    ascend(objective, model, images, noise, particles=PARTICLES, climb="encoder")
