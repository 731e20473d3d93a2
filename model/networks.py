"""Encoder and decoder networks.

They know neither masks nor probability: an encoder takes images to the two halves of a vector,
a decoder takes latents to one parameter plane an image channel.
Every network is rebuilt from its name in `ENCODERS` or `DECODERS` and its arguments.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Generator, Tensor, nn

__all__ = ["DECODERS", "ENCODERS", "MlpDecoder", "MlpEncoder"]

ImageShape = tuple[int, int, int]


class MlpEncoder(nn.Module):
    """Fully connected tanh layers from an image to a mean and a log standard deviation."""

    def __init__(
        self, *, image_shape: ImageShape, latent: int, hidden: Sequence[int], generator: Generator
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.layers = _mlp((channels * height * width, *hidden, 2 * latent), generator)

    def forward(
        self, values: Float[Tensor, "*batch channels height width"]
    ) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"]]:
        """The mean and the logarithm of the standard deviation of q(z | x)."""
        mean, log_std = self.layers(values.flatten(-3)).chunk(2, dim=-1)
        return mean, log_std


class MlpDecoder(nn.Module):
    """Fully connected tanh layers from latents to the parameters of every pixel."""

    def __init__(
        self, *, image_shape: ImageShape, latent: int, hidden: Sequence[int], generator: Generator
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        self.layers = _mlp((latent, *hidden, channels * height * width), generator)

    def forward(
        self, latents: Float[Tensor, "*batch latent"]
    ) -> Float[Tensor, "*batch channels height width"]:
        """The parameters of p(x | z), a plane a channel."""
        return self.layers(latents).unflatten(-1, self.image_shape)


def _mlp(widths: Sequence[int], generator: Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


ENCODERS: dict[str, Callable[..., nn.Module]] = {"mlp": MlpEncoder}
DECODERS: dict[str, Callable[..., nn.Module]] = {"mlp": MlpDecoder}
