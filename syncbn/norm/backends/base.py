"""The interface of a backend: one rank's arithmetic of a training pass, in four phases.

A forward pass is `local_stats`, the exchange of what it returns, then `finish_forward`; a backward pass is
`local_grad_sums`, an exchange, then `finish_backward`. A backend whose `fused` is true also does a whole pass, its
exchange included (`fused_forward`, `fused_backward`), to the same bits.

All backends give the same results within rounding and pass the same tests. No backend waits for a GPU.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from syncbn.norm.moments import Stats, has_values

_WITH_MEMORY = (Tensor, Parameter)
"""Types of tensors that have memory of their own, where they are no meta tensors; subclasses may have none."""


class NonFiniteStatistics(FloatingPointError):
    """NaN, infinite or too large input on some rank; raised on every rank, running statistics untouched."""

    exit_code = 8


class Running(NamedTuple):
    """Running statistics, updated in place.

    Attributes:
        mean: `(C,)`.
        var: `(C,)`; receives the variance M2 / (N - 1) with the N of all ranks.
        num_batches_tracked: `()`, int64, or None.
        momentum: weight of the new statistics; None averages over all batches, which needs the count.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None


class NormArgs(NamedTuple):
    """The operands and settings of one training pass: y = act(batch_norm(x) + residual).

    Attributes:
        x: `(N, C, *)`, any floating dtype.
        weight: `(C,)`; None stands for 1.
        bias: `(C,)`; None stands for 0.
        residual: in the shape of x; in a backward pass only where z is computed again.
        mask: bool, `(N, 1, *)` with the trailing sizes of x, contiguous; None keeps every position.
        act: a name in `ACTIVATIONS`, or None.
        eps: added to the variance.
        running: what a forward pass updates, or None.
        layer: what error messages call the layer.
        world_size: ranks whose statistics are merged; 1 alone.
        output: y, in a backward pass where act follows a residual and act' follows from y.
        bits: one bit a value, whether act' is 1, instead of `output`; see `triton.derivative_bits`.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    act: str | None = None
    eps: float = 1e-5
    running: Running | None = None
    layer: str = ""
    world_size: int = 1
    output: Tensor | None = None
    bits: Tensor | None = None

    def before_act(self) -> "NormArgs":
        """The operands of a backward pass that is given dz, the gradient behind act and residual, in place of dy."""
        return self._replace(act=None, residual=None, output=None, bits=None)


class Backend(ABC):
    """Reductions over, and elementwise maps of, an input `(N, C, *)`.

    Per-channel tensors are `(C,)` in float32, or float64 for float64 input. Elementwise results have the dtype and
    memory format of x. An empty x gives zero sums and empty results.
    """

    fused = False
    """Whether there are `fused_forward` and `fused_backward`."""
    fused_forward: Callable[..., tuple[Tensor, Stats]]
    fused_backward: Callable[..., tuple[Tensor, Tensor]]

    def for_pass(self, args: NormArgs) -> "Backend":
        """The backend that serves a pass over these operands; the same in backward, unless hooks changed them."""
        del args
        return self

    @abstractmethod
    def local_stats(self, args: NormArgs) -> Tensor:
        """The packed moments (see `syncbn.norm.moments`) of the values where the mask is true, `(2 + 2C,)`."""

    @abstractmethod
    def finish_forward(self, args: NormArgs, gathered: Tensor) -> tuple[Tensor, Stats]:
        """The output and the statistics of all ranks, from their packed moments; updates running statistics.

        The statistics have the same bits on every rank. An empty batch on all ranks moves no running statistics.

        Args:
            args: of this pass.
            gathered: packed moments, `(W, 2 + 2C)`, or `(1, 2 + 2C)` where they are reduced or there is one rank.

        Raises:
            NonFiniteStatistics, ValueError: see `check_statistics`; nothing is updated.
        """

    @abstractmethod
    def normalize(self, args: NormArgs, stats: Stats) -> Tensor:
        """act((x - mean) * invstd * weight + bias + residual), and 0 where the mask is false; fills `args.bits`."""

    @abstractmethod
    def local_grad_sums(
        self, dy: Tensor, args: NormArgs, stats: Stats, needs_dz: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of dz and sum of dz * xhat per channel, `(2, C)`; dz = dy * act'(z), 0 outside the mask.

        Returns:
            The sums, and where `needs_dz` dz itself, the residual's gradient, in the dtype of dy.
        """

    @abstractmethod
    def finish_backward(self, dy: Tensor, args: NormArgs, stats: Stats, gathered: Tensor) -> Tensor:
        """Dx = weight * invstd * (dz - A / N - xhat * B / N), and 0 outside the mask.

        Args:
            dy: the gradient of y.
            args: of this pass.
            stats: of the forward pass; a total of 0 counts as N = 1.
            gathered: rows that add up to the sums A and B of all ranks, `(W, 2C)`.
        """

    @abstractmethod
    def grad_residual(self, dy: Tensor, args: NormArgs, stats: Stats) -> Tensor:
        """The gradient of the residual: dz, in the dtype of dy; dy itself where no act and no mask intervene."""

    def empty_bits(self, args: NormArgs) -> Tensor | None:
        """Memory for `args.bits` beside a residual; None where this backend keeps `output` instead."""
        del args
        return None


def kernels_may_read(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels may read operands at their addresses, all on the device of `x`.

    Subclasses and meta tensors may have no memory, and a lazily negated view of another tensor has the other's values
    in it.
    """
    for values in (x, *others):
        if values is not None and (type(values) not in _WITH_MEMORY or values.is_neg()):
            return False
    return not x.is_meta


def kernels_may_write(running: Running) -> bool:
    """Whether kernels may write running statistics at their addresses; `aten.update` moves the others."""
    mean, var, tracked, _ = running
    if not (mean.is_contiguous() and var.is_contiguous() and mean.dtype is var.dtype):
        return False
    if mean.is_inference() or var.is_inference():
        return False
    if tracked is None:
        return kernels_may_read(mean, var)
    counts = tracked.dtype is torch.int64 and tracked.numel() == 1 and not tracked.is_inference()
    return counts and tracked.device == mean.device and kernels_may_read(mean, var, tracked)


def check_statistics(gathered: Tensor, stats: Stats, args: NormArgs) -> None:
    """Raise where there is nothing to normalise with.

    On CUDA a look at values would stall the host, so only a shape that may hold too little is looked at.

    Args:
        gathered: packed moments of all ranks, `(W, 2 + 2C)`.
        stats: their merge.
        args: of this pass.

    Raises:
        NonFiniteStatistics: a variance is not finite; among CPU ranks. Alone, NaN passes through as in torch.
        ValueError: one value per channel over all ranks.
    """
    if not has_values(gathered):
        return
    if gathered.is_cuda:
        if args.mask is not None:
            torch._assert_async(stats.total != 1)  # pyright: ignore[reportPrivateImportUsage]
            return
        if args.x.numel() > args.x.shape[1]:
            return
    elif args.world_size > 1:
        _check_finite(gathered, stats.var, args.layer)
    if float(stats.total) == 1:
        raise ValueError(
            f"SyncBatchNorm {args.layer!r}: expected more than 1 value per channel over all ranks when training"
        )


def _check_finite(gathered: Tensor, var: Tensor, layer: str) -> None:
    # a sum costs a tenth of looking at each value, and is finite only if each is
    if math.isfinite(float(var.sum())) or bool(torch.isfinite(var).all()):
        return
    bad = (~torch.isfinite(gathered)).any(1).nonzero()
    reduced = len(gathered) == 1  # then row 0 is no rank
    where = "on some rank" if reduced or not len(bad) else f"on rank {int(bad[0])} of its group"
    raise NonFiniteStatistics(
        f"SyncBatchNorm {layer!r}: NaN, infinite or too large input {where}; "
        "running statistics are unchanged"
    )
