"""The collective of a pass: packed moments forward, gradient sums backward, for which alone stands this rank's row.

Everything else in the layer is one rank's own arithmetic. Each collective gives all ranks the same bits.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _resolve_process_group as resolve_process_group,  # pyright: ignore[reportPrivateImportUsage]
)

from syncbn.norm.comm.exchange import Exchange, exchange_of
from syncbn.norm.comm.fingerprint import BACKWARD, Fingerprint
from syncbn.norm.moments import add_rows


def gather_rows(
    values: Tensor, exchange: Exchange | None, direction: int, what: Fingerprint
) -> Tensor:
    """`Exchange.combine` of packed moments `(2 + 2C,)` or gradient sums `(2, C)`; alone, this rank's row."""
    values = values.flatten()
    return values.unsqueeze(0) if exchange is None else exchange.combine(values, direction, what)


def sum_over_ranks(values: Tensor, exchange: Exchange | None, what: Fingerprint) -> Tensor:
    """`values` `(k, C)`, added over all ranks; differentiable to any order, and under vmap.

    Vmap knows the operator only as something to call once a sample: one exchange each.
    """
    if exchange is None:
        return values
    return _sum_over_ranks(values, exchange.group_name, *what)


@torch.library.custom_op("syncbn::sum_over_ranks", mutates_args=())
def _sum_over_ranks(
    values: Tensor,
    group: str,
    layer: str,
    num_channels: int,
    dtype: torch.dtype,
    needs_grad: bool,
    serial: int,
) -> Tensor:
    exchange = exchange_of(resolve_process_group(cast(Any, group)))
    what = Fingerprint(layer, num_channels, dtype, needs_grad, serial)
    total = add_rows(gather_rows(values, exchange, BACKWARD, what)).view_as(values)
    return total.clone() if total.data_ptr() == values.data_ptr() else total


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.rest = inputs[1:]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # what one rank's values do to the sum, they do to every rank's
    return _sum_over_ranks(gradient.contiguous(), *ctx.rest), *(None,) * len(ctx.rest)


_sum_over_ranks.register_fake(lambda values, *_: torch.empty_like(values))
_sum_over_ranks.register_autograd(_gradient, setup_context=_remember)
