"""Moments as sums that a reduction can add, and back.

Adding (n, n mean, M2 + n mean^2) loses about 1e-16 mean^2 / var of the variance in float64: nothing to statistics kept
in float32, too much for those kept in float64.
"""

import torch
from torch import Tensor

from syncbn.norm.moments import Moments, pack, unpack


def of_packed(packed: Tensor) -> Tensor:
    """The sums `(1 + 2C,)`, float64, of packed moments `(2 + 2C,)`."""
    counts, means, M2s = (part.to(torch.float64) for part in unpack(packed.unsqueeze(0)))
    first = counts * means[0]
    return torch.cat([counts, first, M2s[0] + first * means[0]])


def to_packed(sums: Tensor) -> Tensor:
    """The packed moments `(1, 2 + 2C)`, float64, of sums `(1 + 2C,)`."""
    count = sums[0]
    first, second = sums[1:].chunk(2)
    mean = first / count.clamp(min=1)
    return pack(Moments(count, mean, (second - first * mean).clamp(min=0))).unsqueeze(0)


def in_order(rows: Tensor) -> Tensor:
    """The sum of `rows` `(W, k)`; on a CPU one after another, to the bits of native/fused_pass.cpp."""
    if rows.is_cuda:
        return rows.sum(0)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
