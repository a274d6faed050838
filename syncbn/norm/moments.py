"""Per-channel moments (count, mean, M2), and how the moments of several ranks become those of all.

M2 is the sum of squared deviations from the mean. Moments are merged, never variances or raw sums of squares:
the merge is exact for any counts, and it does not cancel when the mean is large against the spread.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a set of values per channel comes down to.

    Attributes:
        count: values per channel, `()`, float64 (exact to 2^53).
        mean: `(C,)`, float32, or float64 for float64 input.
        M2: sum of squared deviations from the mean, `(C,)`, as `mean`.
    """

    count: Tensor
    mean: Tensor
    M2: Tensor


def merge(counts: Tensor, means: Tensor, M2s: Tensor) -> Moments:
    """The moments of the union of W sets of values.

    mean = sum n_w mean_w / N and M2 = sum [M2_w + n_w (mean_w - mean)^2], the W-way form of Chan, Golub &
    LeVeque (1983). Computed in float64: C values a rank cost nothing beside the exchange that brought them.

    Args:
        counts: `(W,)`; a set may be empty.
        means: `(W, C)`; ignored where the count is 0.
        M2s: `(W, C)`.

    Returns:
        Moments in the dtype of `means`; all zeros when every set is empty.
    """
    weights = counts.to(torch.float64).unsqueeze(1)
    total = counts.to(torch.float64).sum()
    mean = (weights * means).sum(0) / total.clamp(min=1)
    M2 = (M2s + weights * (means - mean) ** 2).sum(0)
    return Moments(total, mean.to(means.dtype), M2.to(M2s.dtype))
