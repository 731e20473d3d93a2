r"""A refitted encoder: the decoder stays, and the proposal alone is trained on complete images.

An encoder that was trained on images with holes proposes what may lie behind them, and so too
widely for images without: their estimated log-likelihood is then a loose bound, not a bad model.
Two uses, which differ in the images:

- `tight` scores refit the encoder on the very images that are scored (Simkus and Gutmann,
  "Improving variational autoencoder estimation from incomplete data with mixture variational
  families", 2024), so that the bound says what the decoder can do;
- a model is `polished` on its own completions of the training images, which needs no complete
  image and so makes a better encoder to serve.
"""

from collections.abc import Callable
from copy import deepcopy

import torch

from model.latent import LatentVariableModel
from model.likelihood import Stages
from model.masks import Incomplete
from model.noise import Noise, Source
from model.objectives import OBJECTIVES, Objective, ascend, iwae
from model.weights import resample

__all__ = ["completed", "refitted"]

CLIMBED = Objective(bound=iwae, steps=True, p_step="dreg")


def refitted(
    model: LatentVariableModel,
    batch: Callable[[Noise], Incomplete],
    noise: Noise,
    *,
    steps: int,
    particles: int = 20,
    learning_rate: float = 1e-3,
) -> Stages[LatentVariableModel]:
    """The model with another encoder, trained for so many steps on batches of complete images."""
    fresh = deepcopy(model)
    trained = list(fresh.phi())
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained, lr=learning_rate, fused=True)
    for step in range(steps):
        source = noise.at("refit", step)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        ascend(CLIMBED, fresh, batch(source), source, particles=particles, climb="encoder")
        optimizer.step()
        yield
    return fresh.requires_grad_(requires_grad=False)


@torch.no_grad()
def completed(
    model: LatentVariableModel, images: Incomplete, noise: Source, *, particles: int = 50
) -> Incomplete:
    """The images with their holes filled by a draw from p(x_m | x_o), as complete ones."""
    proposal = OBJECTIVES["miss-iwem"].proposal(model, images, noise.at("proposal"))
    latents = proposal.draw(particles, noise.at("particles"))
    log_w = model.particles(images, proposal, latents).log_weights
    uniforms = noise.at("pick").uniform(len(images), 1, like=log_w)
    picked = resample(log_w, uniforms)[..., None].expand(-1, -1, latents.shape[-1])
    filled = model.impute(images, latents.gather(1, picked), noise.at("filling"))
    return Incomplete.complete(filled[:, 0])
