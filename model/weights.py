r"""The algebra of log-weights.

Importance sampling gives weights $w_k = p(x_o, z_k) / q(z_k)$ whose mean estimates $p(x_o)$.
They are kept as $\log w_k$ and, since $K$ may be larger than memory, summed by folds:
a state takes one block of particles after another, `state = state.update(block)`.
With $S = \sum_k w_k$ before a block and $B$ the block's sum,
the block's share is $s = B / (S + B)$, and

$$ m \leftarrow (1 - s)\, m + s \sum_{k \in \text{block}} \tfrac{w_k}{B}\, v_k, \qquad
   \text{slot} \leftarrow \begin{cases} z_k,\ k \sim w_k / B & \text{with probability } s \\
   \text{slot} & \text{otherwise} \end{cases} $$

keep a weighted mean and a slot that holds $z_k$ with probability $w_k / \sum_j w_j$.

Nothing here knows a model.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "RELIABLE_PARETO_K",
    "Mean",
    "Slots",
    "Thinned",
    "WeightSums",
    "effective_sample_size",
    "log_add",
    "log_mean_exp",
    "normalise",
    "pareto_k",
    "resample",
    "thin",
]

RELIABLE_PARETO_K = 0.7
"""Above this shape of the weights' tail their variance is not to be believed (Vehtari 2024)."""


def log_mean_exp(
    log_weights: Float[Tensor, "*batch particles"],
) -> Float[Tensor, "*batch"]:
    """The logarithm of the mean of the weights."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def log_add(
    one: Float[Tensor, "*batch"], other: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """The logarithm of the sum of the numbers with these logarithms.

    Its bits are those that each element has alone. PyTorch's own logaddexp rounds some of those
    that fill the processor's registers otherwise than those that do not.
    """
    return torch.stack([one, other], -1).logsumexp(-1)


def normalise(
    log_weights: Float[Tensor, "*batch particles"],
) -> Float[Tensor, "*batch particles"]:
    """The weights divided by their sum."""
    return log_weights.softmax(-1)


def effective_sample_size(
    log_weights: Float[Tensor, "*batch particles"],
) -> Float[Tensor, "*batch"]:
    """(Σw)² / Σw², between one and the number of particles."""
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


@dataclass(frozen=True)
class WeightSums:
    """Fold: what the weights' mean, its error and the tail's shape are computed from."""

    particles: int
    log_sum: Float[Tensor, " batch"]
    log_sum_squares: Float[Tensor, " batch"]
    largest: Float[Tensor, "batch tail"]
    """The largest log-weights so far, in descending order; −∞ where there were fewer."""

    @classmethod
    def empty(cls, batch: int, *, particles: int, like: Tensor) -> "WeightSums":
        """The sums of nothing, with room for the tail of so many particles."""
        nothing = torch.full((batch,), -torch.inf, dtype=torch.float64, device=like.device)
        largest = nothing[:, None].expand(-1, tail_length(particles) + 1)
        return cls(0, nothing, nothing, largest)

    def update(self, log_weights: Float[Tensor, "batch block"]) -> "WeightSums":
        """The sums with one more block."""
        log_w = log_weights.double()
        together = torch.cat([self.largest, log_w], -1)
        return WeightSums(
            self.particles + log_w.shape[-1],
            log_add(self.log_sum, log_w.logsumexp(-1)),
            log_add(self.log_sum_squares, (2 * log_w).logsumexp(-1)),
            together.topk(self.largest.shape[-1], -1).values,
        )

    def share(self, log_weights: Float[Tensor, "batch block"]) -> Float[Tensor, " batch"]:
        """The part of the total weight that a block has, once it is added."""
        block = log_weights.double().logsumexp(-1)
        return (block - log_add(self.log_sum, block)).exp()

    @property
    def log_mean(self) -> Float[Tensor, " batch"]:
        """The logarithm of (1/K) Σ w, the importance-sampling estimate of log p(x_o)."""
        return self.log_sum - math.log(self.particles)

    @property
    def effective_sample_size(self) -> Float[Tensor, " batch"]:
        """(Σw)² / Σw²."""
        return (2 * self.log_sum - self.log_sum_squares).exp()

    @property
    def standard_error(self) -> Float[Tensor, " batch"]:
        """Monte Carlo standard error of `log_mean` by the delta method, √(1/ESS − 1/K)."""
        return (1 / self.effective_sample_size - 1 / self.particles).clamp(min=0).sqrt()

    @property
    def pareto_k(self) -> Float[Tensor, " batch"]:
        """The shape k̂ of the tail; NaN when there are too few particles to tell."""
        return pareto_k(self.largest[:, : tail_length(self.particles) + 1])


@dataclass(frozen=True)
class Mean:
    """Fold: the self-normalised weighted mean of vectors."""

    value: Float[Tensor, " *batch_and_shape"] = field(default_factory=lambda: torch.zeros(()))

    def update(
        self,
        log_weights: Float[Tensor, "batch block"],
        vectors: Float[Tensor, "batch block *shape"],
        share: Float[Tensor, " batch"],
    ) -> "Mean":
        """The mean with one more block, which has this share of the weight.

        An image at a time: in a product of several some processors add up each in another order.
        """
        w, rows = normalise(log_weights), vectors.flatten(2)
        sums = [of_image @ image for of_image, image in zip(w, rows, strict=True)]
        block = torch.stack(sums).unflatten(-1, vectors.shape[2:])
        part = share.to(block).reshape(-1, *[1] * (block.ndim - 1))
        return Mean((1 - part) * self.value + part * block)


@dataclass(frozen=True)
class Slots:
    """Fold: independent draws of particles by their weights, with replacement."""

    chosen: Float[Tensor, "batch draws latent"]

    @classmethod
    def empty(cls, batch: int, draws: int, latent: int, *, like: Tensor) -> "Slots":
        """Slots that the first block fills."""
        return cls(like.new_zeros(batch, draws, latent))

    def update(
        self,
        log_weights: Float[Tensor, "batch block"],
        latents: Float[Tensor, "batch block latent"],
        share: Float[Tensor, " batch"],
        uniforms: Float[Tensor, "batch draws 2"],
    ) -> "Slots":
        """The slots after one more block: each moves to it with probability `share`."""
        candidate = latents.gather(
            1, resample(log_weights, uniforms[..., 0])[..., None].expand_as(self.chosen)
        )
        moves = uniforms[..., 1] < share[:, None]
        return Slots(torch.where(moves[..., None], candidate, self.chosen))


@dataclass(frozen=True)
class Thinned:
    """Rows that stand for all: the sum of scale·f(row) has the expectation of the whole sum."""

    index: Int[Tensor, "*models count"]
    scale: Float[Tensor, "*models count"]

    def flat(self, rows: int) -> "Thinned":
        """The same rows, counted through all models, which have so many together."""
        models = self.index.shape[:-1].numel()
        first = rows // models * torch.arange(models, device=self.index.device)
        index = self.index.view(models, -1) + first[:, None]
        return Thinned(index.flatten(), self.scale.flatten())


def thin(
    sizes: Float[Tensor, "*models rows"], count: int, uniform: Float[Tensor, "*models 1"]
) -> Thinned:
    """So many rows by systematic sampling, with chances in proportion to their sizes.

    A row whose chance would pass one is certain (Särndal, Swensson and Wretman, "Model Assisted
    Survey Sampling", 1992, section 3.6), and what it leaves goes to the others. With as many as
    there are, they are all rows.
    """
    rows = torch.arange(sizes.shape[-1], device=sizes.device)
    if count >= len(rows):
        return Thinned(rows.expand_as(sizes), torch.ones_like(sizes))
    chance = exact = sizes.double()
    certain = torch.zeros_like(sizes, dtype=torch.bool)
    for _ in range(CAPPING_ROUNDS):
        free = torch.where(certain, 0.0, exact)
        share = free / free.sum(-1, keepdim=True).clamp(min=TINY)
        left = count - certain.sum(-1, keepdim=True)
        chance = torch.where(certain, 1.0, left * share).clamp(max=1)
        certain = chance >= 1
    cumulative = chance.cumsum(-1)
    total = cumulative[..., -1:]
    places = (rows[:count] + uniform.double()) / count
    index = torch.searchsorted(cumulative, places * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # of those with a chance
    index = torch.minimum(index, last)
    scale = total / (count * chance.gather(-1, index).clamp(min=TINY))
    return Thinned(index, scale.to(sizes))


CAPPING_ROUNDS = 8
TINY = 1e-300


def tail_length(particles: int) -> int:
    """How many of the largest weights describe the tail, min(K/5, 3√K) (Vehtari 2024)."""
    return int(min(particles / 5, 3 * math.sqrt(particles)))


def pareto_k(largest: Float[Tensor, "batch tail"]) -> Float[Tensor, " batch"]:
    """The shape of a generalised Pareto distribution fitted to the largest weights.

    Takes the largest log-weights in descending order; the last is the threshold.
    The fit is that of Zhang and Stephens, "A new and efficient estimation method for the
    generalized Pareto distribution" (2009), with the weak prior of Vehtari et al.,
    "Pareto smoothed importance sampling" (2024), section 5. Equal weights have shape 0.
    """
    count = largest.shape[-1] - 1
    if count < MIN_TAIL:
        return largest.new_full(largest.shape[:1], torch.nan)
    scaled = (largest.double() - largest[:, :1]).exp()
    excess = (scaled[:, :-1] - scaled[:, -1:]).flip(-1)
    flat = excess[:, -1] <= 0
    excess = torch.where(flat[:, None], torch.arange(1, count + 1).to(excess), excess)
    b = _candidates(excess)
    log_likelihood = count * _profile(b, excess)
    weight = log_likelihood.softmax(-1)
    k = torch.log1p(-(weight * b).sum(-1, keepdim=True) * excess).mean(-1)
    k = (count * k + 5) / (count + 10)
    return torch.where(flat, 0.0, k)


def resample(
    log_weights: Float[Tensor, "batch particles"], uniforms: Float[Tensor, "batch draws"]
) -> Int[Tensor, "batch draws"]:
    """Which particle each number from [0, 1) picks, by the particles' weights."""
    cumulative = normalise(log_weights.double()).cumsum(-1)
    index = torch.searchsorted(cumulative, uniforms.double() * cumulative[:, -1:], right=True)
    return index.clamp(max=log_weights.shape[-1] - 1)


MIN_TAIL = 5


def _candidates(excess: Float[Tensor, "batch tail"]) -> Float[Tensor, "batch grid"]:
    count = excess.shape[-1]
    size = 30 + int(math.sqrt(count))
    grid = 1 - (size / (torch.arange(1, size + 1).to(excess) - 0.5)).sqrt()
    quartile = excess[:, int(count / 4 + 0.5) - 1, None].clamp(min=1e-300)
    return grid / (3 * quartile) + 1 / excess[:, -1:]


def _profile(
    b: Float[Tensor, "batch grid"], excess: Float[Tensor, "batch tail"]
) -> Float[Tensor, "batch grid"]:
    k = torch.log1p(-b[..., None] * excess[:, None]).mean(-1)
    return (-b / k).log() - k - 1
