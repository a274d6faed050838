"""The arithmetic on one rank: four functions over an input `(N, C, *)`, behind one small interface.

Every implementation gives the same results within rounding and passes the same tests; `pick` chooses one for a
tensor. Nothing here knows of other ranks.
"""

from typing import Protocol

from torch import Tensor

from syncbn.norm.kernels.eager import EagerKernels
from syncbn.norm.moments import Moments

__all__ = ["EagerKernels", "Kernels", "pick"]


class Kernels(Protocol):
    """Reductions over, and element-wise maps of, an input of shape `(N, C, *)`.

    Per-channel tensors are `(C,)` in float32, or float64 for float64 input. Element-wise results have the
    dtype and memory format of `x`. An empty `x` gives zero sums and empty results.
    """

    def moments(self, x: Tensor) -> Moments:
        """Count, mean and M2 per channel."""
        ...

    def normalize(
        self, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """(x - mean) * invstd * weight + bias."""
        ...

    def backward_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of dy, and sum of dy * xhat, per channel."""
        ...

    def backward_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        mean_dy: Tensor,
        mean_dy_xhat: Tensor,
    ) -> Tensor:
        """Weight * invstd * (dy - mean_dy - xhat * mean_dy_xhat), the gradient of the input."""
        ...


_EAGER = EagerKernels()


def pick(x: Tensor) -> Kernels:
    """The kernels that serve `x`, by its device."""
    del x  # one implementation serves every device so far
    return _EAGER
