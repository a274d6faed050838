"""Per-channel moments (count, mean, M2), and how the moments of several ranks become those of all.

M2 is the sum of squared deviations from the mean. Moments are merged, never variances or raw sums of squares:
the merge is exact for any counts, and it does not cancel when the mean is large against the spread.

Between kernels, exchange and merge they travel *packed*, one tensor `(2 + 2C,)`: the count as two values, then C
means, then C M2s, all in the dtype of the statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOW_BITS = 2**20
"""The count travels as count % 2^20 and count // 2^20, because a float32 alone is exact only to 2^24."""


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


class Statistics(NamedTuple):
    """What all ranks normalise with.

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


class Block:
    """What a forward pass found, in one piece of memory: this rank's packed moments, and the statistics of all.

    Tensors of them are made where somebody asks: most passes need addresses alone, and seven small tensors cost 15 us.

    Args:
        channels: C.
        dtype: of the statistics.
    """

    __slots__ = ("__weakref__", "_channels", "values")

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self._channels = channels
        values = _total_values(dtype) + 2 + 5 * channels
        self.values = torch.empty(values, dtype=dtype, device="cpu")

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of the total, this rank's packed moments, the mean, var and invstd."""
        total, channel_bytes = self.values.data_ptr(), self._channels * self.values.itemsize
        own = total + 8
        mean = own + self.own_bytes
        return total, own, mean, mean + channel_bytes, mean + 2 * channel_bytes

    @property
    def own_bytes(self) -> int:
        """Bytes of this rank's packed moments."""
        return packed_bytes(self._channels, self.values.dtype)

    @property
    def own(self) -> Tensor:
        """This rank's packed moments."""
        first = _total_values(self.values.dtype)
        return self.values[first : first + 2 + 2 * self._channels]

    @property
    def statistics(self) -> Statistics:
        """Of all ranks."""
        total = self.values[: _total_values(self.values.dtype)].view(torch.float64).squeeze(0)
        return Statistics(total, *self.values[-3 * self._channels :].view(3, -1).unbind())


class Remembered:
    """What a forward pass found, in several tensors: this rank's packed moments, and the statistics of all ranks."""

    def __init__(self, own: Tensor, statistics: Statistics) -> None:
        self.own = own
        self.statistics = statistics

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """As in `Block`."""
        total, mean, var, invstd = (values.data_ptr() for values in self.statistics)
        return total, self.own.data_ptr(), mean, var, invstd


Found = Remembered | Block
"""What one forward pass found, in several tensors or in one."""


def _total_values(dtype: torch.dtype) -> int:
    """Values of `dtype` that the total takes the place of."""
    return 8 // dtype.itemsize


def packed_bytes(channels: int, dtype: torch.dtype) -> int:
    """Bytes of packed moments, for statistics or inputs of `dtype`."""
    return (2 + 2 * channels) * max(dtype.itemsize, 4)


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
