"""Several models trained as one, because a small one cannot fill a device.

Every fully connected layer of the stack holds the layers of all models, and multiplies each
model's part of the batch by that model's weights; all else treats images one by one anyway.
Adam works weight by weight, so each model takes the very steps that it would take alone.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.latent import LatentVariableModel
from model.noise import Source

__all__ = ["NoisePerModel", "StackedLinear", "stacked"]


class StackedLinear(nn.Module):
    """One linear layer of each model, whose inputs are the models' batches one after another."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]))

    def forward(self, inputs: Float[Tensor, "batch *rows inputs"]) -> Tensor:
        """Each model's outputs for its part of the batch."""
        models, outputs, _ = self.weight.shape
        rows = inputs.reshape(models, -1, inputs.shape[-1])
        products = torch.baddbmm(self.bias[:, None], rows, self.weight.transpose(1, 2))
        return products.view(*inputs.shape[:-1], outputs)


def stacked(models: Sequence[LatentVariableModel]) -> LatentVariableModel:
    """All models as one, whose batch is theirs one after another.

    Raises:
        TypeError: Their networks are not fully connected.
    """
    stack = deepcopy(models[0])
    for path, layer in models[0].named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, name = path.rpartition(".")
            layers = [model.get_submodule(path) for model in models]
            together = StackedLinear([one for one in layers if isinstance(one, nn.Linear)])
            setattr(stack.get_submodule(parent), name, together)
        elif next(layer.parameters(recurse=False), None) is not None:
            raise TypeError(f"Expected fully connected layers to stack; got {layer}.")
    stack.stack = (len(models),)
    return stack


@dataclass(frozen=True)
class NoisePerModel:
    """A source of each model's own: its part of a batch gets what it would get alone."""

    noises: tuple[Source, ...]

    def at(self, *path: int | str) -> "NoisePerModel":
        """The sources for one part of the work."""
        return NoisePerModel(tuple(noise.at(*path) for noise in self.noises))

    def normal(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """N(0, 1) numbers, model by model."""
        first, *rest = shape
        part = first // len(self.noises)
        return torch.cat([noise.normal(part, *rest, like=like) for noise in self.noises])

    def uniform(self, *shape: int, like: Tensor) -> Float[Tensor, " batch *rest"]:
        """Uniform numbers, model by model."""
        first, *rest = shape
        part = first // len(self.noises)
        return torch.cat([noise.uniform(part, *rest, like=like) for noise in self.noises])
