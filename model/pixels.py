r"""The likelihood $p(x \mid z)$: pixels that are independent given the latents.

$$ \log p(x_o \mid z) = \sum_{d \in o} \log p(x_d \mid z), $$

a sum over the observed pixels alone, for any mask.
A likelihood takes the decoder's output, one parameter plane an image channel,
and never a copy of the image for each particle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.masks import Incomplete

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "GaussianPixels",
    "Likelihood",
    "PerParticle",
    "Pixels",
    "bernoulli_sums",
]

PerParticle = Float[Tensor, "batch particles"]
Pixels = Float[Tensor, "batch particles channels height width"]


@no_type_check  # a function with runtime checks cannot be compiled
def bernoulli_sums(
    logits: Tensor, seen: Tensor, observed: Tensor, *, missing: bool = True
) -> tuple[Tensor, ...]:
    """⟨x_o, l⟩ − Σ_o softplus(l) and, if asked for, Σ_m (σ(l)·l − softplus(l)), a row a particle.

    With e = exp(−|l|), softplus(l) = max(l, 0) + log(1 + e), and a sum of such logarithms is the
    logarithm of a product. A particle's pixels are dealt out to lanes, as many as fill a
    processor's registers where that can be: each has few enough for their product, and all sums
    and products are one loop, in the precision of the image's pixels.
    """
    pixels = logits.shape[-1]
    sizes = [d for d in LENGTHS if pixels % d == 0]
    size = max([d for d in sizes if pixels // d % REGISTER == 0] or sizes)
    dealt = logits.to(seen).unflatten(-1, (size, -1))
    x, here = (plane[:, None].unflatten(-1, (size, -1)) for plane in (seen, observed))
    far = dealt.abs()
    decay = torch.exp2(far * -LOG2_E)  # which torch.compile keeps in a register, unlike exp
    linear = (x * dealt - here * dealt.clamp(min=0)).sum(-2)
    density = (linear - (1 + here * decay).prod(-2).log()).sum(-1)
    if not missing:
        return (density,)
    there = 1 - here
    linear = (there * far * decay / (1 + decay)).sum(-2)
    return density, -(linear + (1 + there * decay).prod(-2).log()).sum(-1)


BISECTIONS = 40
LOG2_E = 1 / math.log(2)
LENGTHS = range(1, 121)
"""Of numbers between one and two whose product fits in single precision."""
REGISTER = 16
"""Numbers in single precision that a processor's widest registers hold."""


@dataclass(frozen=True)
class Bernoulli:
    """Binary pixels, whose parameters are logits."""

    binary: ClassVar[bool] = True
    compiled: Callable[..., tuple[PerParticle, ...]] | None = None
    """`bernoulli_sums` in machine code, where somebody has compiled it."""

    def log_density(self, logits: Pixels, images: Incomplete) -> PerParticle:
        """The logarithm of p(x_o | z)."""
        seen, observed = _planes(logits, images)
        if self.compiled is not None and not torch.is_grad_enabled():
            return self.compiled(logits.flatten(2), seen, observed, missing=False)[0]
        return _BernoulliLogDensity.apply(logits.flatten(2).to(seen), seen, observed)  # pyright: ignore[reportReturnType]

    def log_density_of(
        self, logits: Pixels, values: Float[Tensor, "batch ..."], where: Bool[Tensor, "batch ..."]
    ) -> PerParticle:
        """The log-probability of some pixels of known values."""
        return self.log_density(logits, Incomplete.hide(values, where))

    @torch.no_grad()
    def log_densities(self, logits: Pixels, images: Incomplete) -> tuple[PerParticle, PerParticle]:
        """Without gradient, log p(x_o | z) and E log p(x_m | z) under p(x_m | z) itself."""
        seen, observed = _planes(logits, images)
        density, expected = (self.compiled or bernoulli_sums)(logits.flatten(2), seen, observed)
        return density, expected

    def slope(self, logits: Pixels, images: Incomplete) -> Pixels:
        """Of log p(x_o | z) in the logits."""
        observed = images.observed[:, None].to(logits)
        seen = images.values[:, None] * observed
        return torch.addcmul(seen, _sigmoid(logits), observed, value=-1)

    def curvature(self, logits: Pixels, images: Incomplete) -> Pixels:
        """Of log p(x_o | z) in the logits, without its sign."""
        mean = _sigmoid(logits)
        return mean * (1 - mean) * images.observed[:, None]

    def mean(self, logits: Pixels) -> Pixels:
        """E[x | z]."""
        return _sigmoid(logits)

    def mean_square(self, logits: Pixels) -> Pixels:
        """E[x² | z]."""
        return _sigmoid(logits)

    def quantiles(
        self,
        mean: Float[Tensor, "batch channels height width"],
        _logits: Pixels,
        levels: Sequence[float],
    ) -> Float[Tensor, "batch levels channels height width"]:
        """At each level the least value that is not exceeded with that probability.

        Takes the pixels' mean, and what the decoder made of equally likely latents.
        """
        above = mean.new_tensor(levels)[:, None, None, None]
        return (1 - mean[:, None] < above).to(mean)

    def sample(
        self,
        logits: Float[Tensor, "*batch channels height width"],
        uniforms: Float[Tensor, "*batch channels height width"],
    ) -> Float[Tensor, "*batch channels height width"]:
        """Pixels x ~ p(x | z), from numbers that are uniform on [0, 1)."""
        return (uniforms < _sigmoid(logits)).to(logits)


def _planes(logits: Pixels, images: Incomplete) -> tuple[Tensor, Tensor]:
    """The observed pixels and where they are, in single precision at least."""
    precision = torch.promote_types(logits.dtype, torch.float32)
    observed = images.observed.flatten(1).to(precision)
    return images.values.flatten(1) * observed, observed


def _sigmoid(logits: Tensor) -> Tensor:
    """σ(l), whose bits do not depend on where in memory it lies.

    Those of PyTorch's own functions σ and softplus do: what is left at the end of an array, which
    does not fill the processor's registers, is computed by other instructions.
    """
    return 1 / (1 + (-logits).exp())


class _BernoulliLogDensity(torch.autograd.Function):
    """⟨x_o, l⟩ − Σ_o softplus(l), without a copy of x a particle."""

    @staticmethod
    def forward(ctx, logits, seen, observed):  # noqa: ANN001, ANN205  # pyright: ignore[reportMissingParameterType]
        ctx.save_for_backward(logits, seen, observed)
        softplus = logits.abs().neg_().exp_().log1p_().add_(logits.clamp(min=0))
        return softplus.mul_(-observed[:, None]).addcmul_(logits, seen[:, None]).sum(-1)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205  # pyright: ignore[reportMissingParameterType, reportIncompatibleMethodOverride]
        logits, seen, observed = ctx.saved_tensors
        slope = torch.addcmul(seen[:, None], _sigmoid(logits), observed[:, None], value=-1)
        return slope * gradient[..., None], None, None


class GaussianPixels(nn.Module):
    """Real pixels x_d ~ N(m_d, σ_d²), whose parameters are means; σ_d is the pixel's own."""

    binary: ClassVar[bool] = False

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(image_shape))

    def log_density(self, means: Pixels, images: Incomplete) -> PerParticle:
        """The logarithm of p(x_o | z)."""
        standard = (images.values[:, None] - means) * (-self.log_std).exp()
        each = -0.5 * (standard.square() + math.log(2 * math.pi)) - self.log_std
        return torch.where(images.observed[:, None], each, 0.0).sum((2, 3, 4))

    def log_density_of(
        self, means: Pixels, values: Float[Tensor, "batch ..."], where: Bool[Tensor, "batch ..."]
    ) -> PerParticle:
        """The log-density of some pixels of known values."""
        return self.log_density(means, Incomplete.hide(values, where))

    @torch.no_grad()
    def log_densities(self, means: Pixels, images: Incomplete) -> tuple[PerParticle, PerParticle]:
        """Without gradient, log p(x_o | z) and E log p(x_m | z) under p(x_m | z) itself."""
        each = -0.5 * (1 + math.log(2 * math.pi)) - self.log_std
        expected = torch.where(images.observed, 0.0, each).sum((1, 2, 3))
        return self.log_density(means, images), expected[:, None].expand(means.shape[:2])

    def slope(self, means: Pixels, images: Incomplete) -> Pixels:
        """Of log p(x_o | z) in the means."""
        away = torch.where(images.observed[:, None], images.values[:, None] - means, 0.0)
        return away * (-2 * self.log_std).exp()

    def curvature(self, means: Pixels, images: Incomplete) -> Pixels:
        """Of log p(x_o | z) in the means, without its sign."""
        precision = (-2 * self.log_std).exp()
        return torch.where(images.observed[:, None], precision, 0.0).expand_as(means)

    def mean(self, means: Pixels) -> Pixels:
        """E[x | z]."""
        return means

    def mean_square(self, means: Pixels) -> Pixels:
        """E[x² | z]."""
        return means.square() + (2 * self.log_std).exp()

    def quantiles(
        self,
        _mean: Float[Tensor, "batch channels height width"],
        means: Pixels,
        levels: Sequence[float],
    ) -> Float[Tensor, "batch levels channels height width"]:
        """Those of the mixture over equally likely latents, by bisection."""
        std = self.log_std.exp()
        found: list[Tensor] = []
        for level in levels:
            reach = std * abs(torch.special.ndtri(means.new_tensor(level)))
            low, high = means.amin(1) - reach, means.amax(1) + reach
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                below = torch.special.ndtr((middle[:, None] - means) / std).mean(1) < level
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            found.append((low + high) / 2)
        return torch.stack(found, 1) if found else means.new_zeros(len(means), 0, *means.shape[2:])

    def sample(
        self,
        means: Float[Tensor, "*batch channels height width"],
        uniforms: Float[Tensor, "*batch channels height width"],
    ) -> Float[Tensor, "*batch channels height width"]:
        """Pixels x ~ p(x | z), from numbers that are uniform on [0, 1)."""
        smallest = torch.finfo(uniforms.dtype).eps / 2  # in place of a zero, whose quantile is −∞
        normals = torch.special.ndtri(uniforms.clamp(min=smallest))
        return means + self.log_std.exp() * normals


Likelihood = Bernoulli | GaussianPixels
LIKELIHOODS: dict[str, Callable[[tuple[int, int, int]], Likelihood]] = {
    "bernoulli": lambda _image_shape: Bernoulli(),
    "gaussian": GaussianPixels,
}
