"""The arithmetic on one rank: a few functions over an input `(N, C, *)`, behind one small interface.

Every implementation gives the same results within rounding and passes the same tests; `pick` chooses one for a
tensor. Nothing here knows of other ranks, and nothing here waits for a GPU.
"""

from typing import Protocol, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.jit._trace import is_tracing

from syncbn.norm.backends.activations import ACTIVATIONS, check_act
from syncbn.norm.backends.aten import EagerKernels
from syncbn.norm.backends.choice import chosen
from syncbn.norm.backends.operands import Affine, Fused, Running
from syncbn.norm.moments import Statistics

__all__ = [
    "ACTIVATIONS",
    "Affine",
    "EagerKernels",
    "Fused",
    "Kernels",
    "LaunchedKernels",
    "Running",
    "check_act",
    "faster_alone",
    "launched_kernels",
    "pick",
    "room_for_bits",
]


WORTH_IT_PLANES, WORTH_IT_HALF, WORTH_IT = 2**17, 2**19, 2**20
"""Values from which on a layer alone is faster here than in torch: float32 planes, halves, all else (1 thread)."""


class Kernels(Protocol):
    """Reductions over, and element-wise maps of, an input of shape `(N, C, *)`.

    Per-channel tensors are `(C,)` in float32, or float64 for float64 input. Element-wise results have the
    dtype and memory format of `x`. An empty `x` gives zero sums and empty results.

    Attributes:
        launched: whether they are `LaunchedKernels`.
    """

    launched: bool

    def moments(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The packed moments (see `syncbn.norm.moments`) of the values where `mask` is true, `(2 + 2C,)`."""
        ...

    def merge(self, packed: Tensor, eps: float) -> Statistics:
        """What W ranks' packed moments, `(W, 2 + 2C)`, come down to; the same bits on every rank."""
        ...

    def update(self, running: Running, statistics: Statistics) -> None:
        """Move the running statistics towards those of this batch, in place; an empty batch moves nothing."""
        ...

    def normalize(self, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual), and 0 where the mask is false."""
        ...

    def backward_sums(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """Sum of dz, and sum of dz * xhat, per channel, `(2, C)`; dz = dy * act'(z), 0 outside the mask."""
        ...

    def backward_input(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, sums: Tensor, total: Tensor
    ) -> Tensor:
        """Weight * invstd * (dz - sums[0] / total - xhat * sums[1] / total), and 0 outside the mask.

        `sums` are the `backward_sums` of all ranks, added, and `total` is the number of values per channel over all
        ranks, `()`, float64, where 0 counts as 1.
        """
        ...

    def backward_residual(self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused) -> Tensor:
        """The gradient of the residual: dz, in the dtype of `dy`."""
        ...


class LaunchedKernels(Kernels, Protocol):
    """Kernels that are launched on a device: what the host does for a pass takes longer than most of them run."""

    def room_for_bits(self, x: Tensor, act: str | None) -> Tensor | None:
        """Where `normalize` and `finish` note `Fused.bits`; None where they keep none."""
        ...

    def finish(
        self,
        x: Tensor,
        packed: Tensor,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        fused: Fused,
        running: Running | None,
    ) -> tuple[Tensor, Statistics]:
        """`merge`, `update` and `normalize` in one launch, to the same bits; `x` is not empty."""
        ...

    def dense(self, x: Tensor) -> Tensor:
        """`x` as the kernels read it: contiguous in its memory format, usually itself."""
        ...

    def backward_sums(
        self, dy: Tensor, x: Tensor, affine: Affine, fused: Fused, dz: Tensor | None = None
    ) -> Tensor:
        """As of `Kernels`; and dz itself, where it is given, with the strides of `x` as the kernels read it."""
        ...


def launched_kernels(x: Tensor) -> LaunchedKernels | None:
    """The kernels that serve `x`, if they are launched."""
    kernels = chosen(x.device.type)
    return cast(LaunchedKernels, kernels) if kernels.launched else None


def room_for_bits(x: Tensor, act: str | None) -> Tensor | None:
    """Room for `Fused.bits` beside a residual, where the kernels that serve `x` can do with them; None elsewhere."""
    kernels = launched_kernels(x)
    return None if kernels is None else kernels.room_for_bits(x, act)


def pick(x: Tensor) -> Kernels:
    """The kernels that serve `x`, by its device; see `choice`."""
    return chosen(x.device.type)


def faster_alone(x: Tensor) -> bool:
    """Whether a group of one does better with kernels of ours than with torch's batch norm.

    Below some size the way through Python costs more than the kernels save. Where a transform or a tracer looks on,
    torch's own operation is the one it knows.
    """
    if type(x) is not Tensor or x.device.type != "cpu":
        return False
    planes = x.dtype == torch.float32 and x.is_contiguous()
    halves = x.itemsize == 2
    if x.numel() < (WORTH_IT_PLANES if planes else WORTH_IT_HALF if halves else WORTH_IT):
        return False
    watched = is_tracing() or peek_interpreter_stack() is not None
    return not watched and not isinstance(pick(x), EagerKernels)
