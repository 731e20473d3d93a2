r"""Rubin's rules: what completions say of a quantity, together.

An analysis of each of $M$ completions gives an estimate $\hat Q_i$ and its variance $U_i$.
With the means $\bar Q$ and $\bar U$ and the variance $B$ of the estimates,

$$ T = \bar U + (1 + 1/M)\, B, \qquad r = (1 + 1/M)\, B / \bar U, \qquad
   \nu = (M - 1)(1 + 1/r)^2 $$

are the total variance, its relative increase by what is missing, and the degrees of freedom of
$(\bar Q - Q) / \sqrt T$ (Rubin, "Multiple imputation for nonresponse in surveys", 1987). Where the
analysis of complete data has few degrees of freedom itself, so has the whole (Barnard and Rubin,
"Small-sample degrees of freedom with multiple imputation", 1999).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Pooled", "pool"]


@dataclass(frozen=True)
class Pooled:
    """A quantity's estimate over all completions."""

    value: Float[Tensor, "*quantities"]
    within: Float[Tensor, "*quantities"]
    """The variance that a complete image would leave."""
    between: Float[Tensor, "*quantities"]
    """The variance of the estimates over the completions."""
    standard_error: Float[Tensor, "*quantities"]
    degrees_of_freedom: Float[Tensor, "*quantities"]
    """Of Student's t by which an interval is made."""
    missing_information: Float[Tensor, "*quantities"]
    """The share of the total variance that is due to what is missing."""


def pool(
    estimates: Float[Tensor, "completions ..."],
    variances: Float[Tensor, "completions ..."],
    *,
    complete_freedom: float = math.inf,
) -> Pooled:
    """The estimates of the completions and their variances as one.

    Raises:
        ValueError: There are fewer than two completions.
    """
    count = len(estimates)
    if count < 2:  # noqa: PLR2004
        raise ValueError(f"Expected at least 2 completions; got {count}.")
    q, u = estimates.double(), variances.double()
    within, between = u.mean(0), q.var(0)
    more = (1 + 1 / count) * between
    total = within + more
    share = torch.where(total > 0, more / total, 0.0)
    freedom = (count - 1) / share.square()
    if math.isfinite(complete_freedom):
        observed = (complete_freedom + 1) / (complete_freedom + 3) * complete_freedom * (1 - share)
        freedom = 1 / (1 / freedom + 1 / observed)
    return Pooled(q.mean(0), within, between, total.sqrt(), freedom, share)
