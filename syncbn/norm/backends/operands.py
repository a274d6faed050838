"""What kernels are handed beside the input: per-channel coefficients, what is fused, running statistics."""

from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """What a channel is normalised with, each `(C,)`.

    Attributes:
        mean: in the statistics' dtype.
        invstd: 1 / sqrt(var + eps), likewise.
        weight: of any floating dtype; None stands for 1.
        bias: likewise; None stands for 0.
    """

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


class Fused(NamedTuple):
    """What is done in the same pass as normalising: y = act(z + residual), 0 where the mask is false.

    Attributes:
        act: a name in `ACTIVATIONS`, or None.
        residual: in the shape of x, any floating dtype. In backward it is there only where z is computed again.
        mask: bool, `(N, 1, *)` with the trailing sizes of x, contiguous; None keeps every position.
        output: y, in backward only, where act has a residual and its derivative follows from y.
        bits: in the place of `output`, in forward to be filled: whether act' is 1, a bit a value; see `bits`.
    """

    act: str | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    output: Tensor | None = None
    bits: Tensor | None = None


class Running(NamedTuple):
    """Running statistics, updated in place.

    Attributes:
        mean: `(C,)`.
        var: `(C,)`; gets the variance M2 / (N - 1) with the N of all ranks.
        num_batches_tracked: `()`, int64, or None.
        momentum: weight of the new statistics; None averages over all batches, which needs the count.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
