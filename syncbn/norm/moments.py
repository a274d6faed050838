"""Per-channel moments (count, mean, M2), and the statistics that the moments of several ranks merge into.

M2 is the sum of squared deviations from the mean. Moments are merged, never variances or raw sums of squares:
the merge is exact for any counts, and it does not cancel when the mean is large against the spread.

Between backends, the exchange and the merge moments travel *packed*, one tensor `(2 + 2C,)`: the count as two values,
then C means, then C M2s, all in the dtype of the statistics. Over many ranks a reduction adds them as *sums*
`(1 + 2C,)`, float64: (n, n mean, M2 + n mean^2). That loses about 1e-16 mean^2 / var of the variance: nothing for
statistics kept in float32, too much for those kept in float64, which are always gathered.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

LOW_BITS = 2**20
"""The count travels as count % 2^20 and count // 2^20, because a float32 alone is exact only to 2^24."""


class Moments(NamedTuple):
    """The moments of a set of values per channel.

    Attributes:
        count: values per channel, `()`, float64 (exact to 2^53).
        mean: `(C,)`, float32, or float64 for float64 input.
        M2: sum of squared deviations from the mean, `(C,)`, as `mean`.
    """

    count: Tensor
    mean: Tensor
    M2: Tensor


class Stats(Protocol):
    """The statistics of all ranks, in whatever memory a backend keeps them; see `Statistics`."""

    @property
    def total(self) -> Tensor: ...  # noqa: D102
    @property
    def mean(self) -> Tensor: ...  # noqa: D102
    @property
    def var(self) -> Tensor: ...  # noqa: D102
    @property
    def invstd(self) -> Tensor: ...  # noqa: D102


class Statistics(NamedTuple):
    """The statistics that all ranks normalise with.

    Attributes:
        total: values per channel over all ranks, `()`, float64.
        mean: `(C,)`, float32, or float64 for float64 input.
        var: M2 / N, as `mean`.
        invstd: 1 / sqrt(var + eps), as `mean`.
    """

    total: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor


def has_values(x: Tensor) -> bool:
    """Whether `x` has values, rather than a shape alone (a meta or fake tensor)."""
    return not x.is_meta and (type(x) is Tensor or not is_fake(x))


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack(moments: Moments) -> Tensor:
    """`moments` as one tensor, `(2 + 2C,)`."""
    low = moments.count % LOW_BITS
    counts = torch.stack([low, (moments.count - low) / LOW_BITS]).to(moments.mean.dtype)
    return torch.cat([counts, moments.mean, moments.M2])


def unpack(packed: Tensor) -> Moments:
    """Counts `(W,)`, means `(W, C)` and M2s `(W, C)` of packed moments `(W, 2 + 2C)`."""
    counts = packed[:, :2].to(torch.float64)
    means, M2s = packed[:, 2:].chunk(2, dim=1)
    return Moments(counts[:, 0] + counts[:, 1] * LOW_BITS, means, M2s)


def merge(counts: Tensor, means: Tensor, M2s: Tensor) -> Moments:
    """The moments of the union of W sets of values.

    mean = sum n_w mean_w / N and M2 = sum [M2_w + n_w (mean_w - mean)^2], the W-way form of Chan, Golub &
    LeVeque (1983). Computed in float64: C values a rank cost nothing against their exchange.

    Args:
        counts: `(W,)`; a set may be empty.
        means: `(W, C)`; any finite values where the count is 0.
        M2s: `(W, C)`.

    Returns:
        Moments in the dtype of `means`; all zeros when every set is empty.
    """
    weights = counts.to(torch.float64).unsqueeze(1)
    total = counts.to(torch.float64).sum()
    mean = (weights * means).sum(0) / total.clamp(min=1)
    M2 = (M2s + weights * (means - mean) ** 2).sum(0)
    return Moments(total, mean.to(means.dtype), M2.to(M2s.dtype))


def to_sums(packed: Tensor) -> Tensor:
    """The sums `(1 + 2C,)`, float64, of packed moments `(2 + 2C,)`."""
    counts, means, M2s = (part.to(torch.float64) for part in unpack(packed.unsqueeze(0)))
    first = counts * means[0]
    return torch.cat([counts, first, M2s[0] + first * means[0]])


def from_sums(sums: Tensor) -> Tensor:
    """The packed moments `(1, 2 + 2C)`, float64, of sums `(1 + 2C,)`."""
    count = sums[0]
    first, second = sums[1:].chunk(2)
    mean = first / count.clamp(min=1)
    return pack(Moments(count, mean, (second - first * mean).clamp(min=0))).unsqueeze(0)


def add_rows(rows: Tensor) -> Tensor:
    """The sum of `rows` `(W, k)`; on a CPU one after another, to the bits of the native library."""
    if rows.is_cuda:
        return rows.sum(0)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
