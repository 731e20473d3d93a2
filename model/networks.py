"""Encoder and decoder networks.

They know neither masks nor probability: an encoder takes images to the two halves of a vector,
a decoder takes latents to one parameter plane an image channel, in bf16 where autocast has it.
Every network is rebuilt from its name in `ENCODERS` or `DECODERS` and its arguments.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

__all__ = [
    "DECODERS",
    "ENCODERS",
    "GatedConvDecoder",
    "GatedConvEncoder",
    "Gaussian",
    "ImageShape",
    "LinearDecoder",
    "MlpDecoder",
    "MlpEncoder",
]

ImageShape = tuple[int, int, int]
ONEDNN = torch.ops.mkldnn
"""What PyTorch compiles models to on a CPU; no stated interface, and not in every build."""


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
        mean, log_std = _through(self.layers, values.flatten(-3)).to(values).chunk(2, dim=-1)
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
        self.packed: list[Tensor] | None = None
        """The weights as oneDNN lays them out, where they are to stay as they are."""

    def pack(self) -> None:
        """Lays the weights out for a CPU's multiplications, which take tanh along.

        They must not be changed after it. They are used in inference mode alone, where there are
        no derivatives: these multiplications have none, and forward ones would come out as zero.
        """
        weights = [layer.weight for layer in self.layers if isinstance(layer, nn.Linear)]
        here = torch.backends.mkldnn.is_available() and hasattr(ONEDNN, "_linear_pointwise")
        if here and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights):
            self.packed = [ONEDNN._reorder_linear_weight(w.detach()) for w in weights]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: its weights may be changed, so they are not packed."""
        return {**self.__dict__, "packed": None}

    def forward(
        self, latents: Float[Tensor, "*batch latent"]
    ) -> Float[Tensor, "*batch channels height width"]:
        """The parameters of p(x | z), a plane a channel."""
        return _through(self.layers, latents, self.packed).unflatten(-1, self.image_shape)

    def tangents(
        self, latents: Float[Tensor, "rows latent"]
    ) -> Float[Tensor, "rows latent pixels"]:
        """The derivatives of every parameter in every latent, by the chain rule layer by layer."""
        return _tangents(self.layers, latents)


class LinearDecoder(nn.Module):
    """An affine map from latents to the parameters of every pixel."""

    def __init__(
        self, *, image_shape: ImageShape, latent: int, hidden: Sequence[int], generator: Generator
    ) -> None:
        super().__init__()
        del hidden  # there is nothing between
        self.image_shape = image_shape
        self.layers = _mlp((latent, math.prod(image_shape)), generator)

    def forward(
        self, latents: Float[Tensor, "*batch latent"]
    ) -> Float[Tensor, "*batch channels height width"]:
        """The parameters of p(x | z), a plane a channel."""
        return _through(self.layers, latents).unflatten(-1, self.image_shape)

    def tangents(
        self, latents: Float[Tensor, "rows latent"]
    ) -> Float[Tensor, "rows latent pixels"]:
        """The derivatives of every parameter in every latent, which are the same everywhere."""
        return _tangents(self.layers, latents)

    @property
    def layer(self) -> nn.Linear:
        """The map itself."""
        (layer,) = self.layers
        assert isinstance(layer, nn.Linear)
        return layer


class Gaussian(nn.Module):
    """Fully connected tanh layers from one layer of latents to the Gaussian of another."""

    def __init__(self, widths: Sequence[int], generator: Generator) -> None:
        super().__init__()
        self.layers = _mlp(widths, generator)

    def forward(
        self, latents: Float[Tensor, "*batch inputs"]
    ) -> tuple[Float[Tensor, "*batch outputs"], Float[Tensor, "*batch outputs"]]:
        """The mean and the logarithm of the standard deviation."""
        mean, log_std = _through(self.layers, latents).to(latents).chunk(2, dim=-1)
        return mean, log_std


class GatedConvEncoder(nn.Module):
    """Gated convolutions, two of which halve the sides, from an image to a mean and log std.

    The network of the slides; its log-variance is kept within [−6, 2].
    """

    def __init__(
        self, *, image_shape: ImageShape, latent: int, hidden: Sequence[int], generator: Generator
    ) -> None:
        super().__init__()
        del hidden  # the widths between the latents and the planes are the decoder's
        channels, height, width = image_shape
        planes = 6 * -(-height // 4) * -(-width // 4)
        self.convolutions = nn.Sequential(
            Gated(_convolution(channels, 2 * 32, 7, generator)),
            Gated(_convolution(32, 2 * 32, 3, generator, stride=2)),
            Gated(_convolution(32, 2 * 64, 5, generator)),
            Gated(_convolution(64, 2 * 64, 3, generator, stride=2)),
            Gated(_convolution(64, 2 * 6, 3, generator)),
        )
        self.out = _dense(planes, 2 * latent, generator)

    def forward(
        self, values: Float[Tensor, "*batch channels height width"]
    ) -> tuple[Float[Tensor, "*batch latent"], Float[Tensor, "*batch latent"]]:
        """The mean and the logarithm of the standard deviation of q(z | x)."""
        planes = self.convolutions(values.flatten(0, -4)).flatten(1)
        out = self.out(planes).to(values)
        mean, log_variance = out.unflatten(0, values.shape[:-3]).chunk(2, dim=-1)
        return mean, 0.5 * log_variance.clamp(-6, 2)


class GatedConvDecoder(nn.Module):
    """Gated dense layers from latents to an image's planes, then gated 3×3 convolutions."""

    def __init__(
        self, *, image_shape: ImageShape, latent: int, hidden: Sequence[int], generator: Generator
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        widths = (latent, *hidden, channels * height * width)
        self.dense = nn.Sequential(
            *[Gated(_dense(i, 2 * o, generator)) for i, o in pairwise(widths)]
        )
        self.convolutions = nn.Sequential(
            Gated(_convolution(channels, 2 * 64, 3, generator)),
            *[Gated(_convolution(64, 2 * 64, 3, generator)) for _ in range(3)],
            _convolution(64, channels, 1, generator),
        )

    def forward(
        self, latents: Float[Tensor, "*batch latent"]
    ) -> Float[Tensor, "*batch channels height width"]:
        """The parameters of p(x | z), a plane a channel."""
        planes = self.dense(latents).flatten(0, -2).unflatten(-1, self.image_shape)
        return self.convolutions(planes).unflatten(0, latents.shape[:-1])


class Gated(nn.Module):
    """A layer of which one half of the outputs opens and shuts the other, h·σ(g)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Half as many features as the layer gives, which are on the axis before the sides'."""
        axis = 1 if isinstance(self.layer, nn.Conv2d) else -1
        open_to, gate = self.layer(inputs).chunk(2, axis)
        return open_to * gate.sigmoid()  # torch's glu has no derivative for many at once


def _dense(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    nn.init.kaiming_normal_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _convolution(
    inputs: int, outputs: int, size: int, generator: Generator, *, stride: int = 1
) -> nn.Conv2d:
    layer = nn.Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, device="meta"
    ).to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


FEWEST_ROWS = 16
"""Fewer are multiplied in another order, and so a row would not have the same bits alone."""


def _through(
    layers: nn.Sequential,
    inputs: Float[Tensor, "*batch inputs"],
    packed: list[Tensor] | None = None,
) -> Tensor:
    """The outputs of fully connected layers, a row's the same whatever rows are beside it."""
    if torch.is_grad_enabled():
        return layers(inputs)
    rows = inputs.flatten(0, -2)
    stacked = not all(isinstance(layer, nn.Linear | nn.Tanh) for layer in layers)
    whole = rows if stacked else _filled_up(rows)  # a stack shares its rows out among models
    if packed is not None and torch.is_inference_mode_enabled():
        found = _packed(layers, packed, whole)
    else:
        found = _in_place(layers, whole)
    return found[: len(rows)].unflatten(0, inputs.shape[:-1])


def _filled_up(rows: Float[Tensor, "rows inputs"]) -> Tensor:
    lacking = -len(rows) % FEWEST_ROWS
    return torch.cat([rows, rows.new_zeros(lacking, rows.shape[-1])]) if lacking else rows


def _in_place(layers: nn.Sequential, rows: Float[Tensor, "rows inputs"]) -> Tensor:
    """The layers' outputs where nobody needs what was there before for a gradient."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            rows = rows @ layer.weight.T
            rows.add_(layer.bias.to(rows))  # one of another precision would be added far slower
        elif isinstance(layer, nn.Tanh):
            rows = rows.tanh_()
        else:
            rows = layer(rows)
    return rows


def _packed(
    layers: nn.Sequential, weights: Sequence[Tensor], rows: Float[Tensor, "rows inputs"]
) -> Tensor:
    """The same with packed weights, each product with its bias and its tanh at once."""
    biases = [layer.bias for layer in layers if isinstance(layer, nn.Linear)]
    activations = ["tanh"] * (len(weights) - 1) + ["none"]
    for weight, bias, activation in zip(weights, biases, activations, strict=True):
        rows = ONEDNN._linear_pointwise(rows, weight, bias, activation, [], "none")
    return rows


def _tangents(layers: nn.Sequential, rows: Float[Tensor, "rows inputs"]) -> Tensor:
    tangents = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
    tangents, reached = tangents.expand(len(rows), -1, -1), _filled_up(rows)
    for layer in layers:
        reached = layer(reached)
        if isinstance(layer, nn.Linear):
            tangents = tangents @ layer.weight.T
        else:
            tangents = tangents * (1 - reached[: len(rows)].square())[:, None]
    return tangents


def _mlp(widths: Sequence[int], generator: Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MlpEncoder,
    "gated-conv": GatedConvEncoder,
}
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MlpDecoder,
    "gated-conv": GatedConvDecoder,
    "linear": LinearDecoder,
}
