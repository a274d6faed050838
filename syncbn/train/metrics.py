"""Metrics of torchmetrics over all ranks, reduced by the run's own runtime.

Every rank gets the states of all, as bytes, and reduces them itself: any state travels exactly,
lists of any length too. Ranks that have seen no sample are left out, so that the defaults of their states count for
nothing; states that are a mean are weighted by the samples behind them.
"""

import io
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_mean

from syncbn.runtime.base import Runtime
from syncbn.structure import mapped

States = dict[str, dict[str, Any]]
"""By metric and by the state's name."""


def prepared(metrics: dict[str, Metric], device: torch.device) -> dict[str, Metric]:
    """`metrics` on `device`, counting in whole numbers or float64, and leaving other ranks to `reduce_over_ranks`."""
    for name, one in metrics.items():
        for _, metric in _parts(name, one.to(device)):
            if not all(_is_whole(default) for default in metric._defaults.values()):
                metric.set_dtype(torch.float64)
            # Else torchmetrics would reduce over the default group, once more, and where a process is alone too.
            metric.sync_on_compute = metric._to_sync = False
    return metrics


def _is_whole(default: Any) -> bool:
    return isinstance(default, Tensor) and not default.is_floating_point()


def reduce_over_ranks(metrics: dict[str, Metric], num_samples: int, runtime: Runtime) -> None:
    """Give every rank's `metrics` the states of one that has seen all ranks' samples; a collective."""
    if runtime.world_size == 1:
        return
    own = {
        path: _states(metric) for name, one in metrics.items() for path, metric in _parts(name, one)
    }
    ranks = [rank for rank in _gathered((num_samples, own), runtime) if rank[0]]
    counts = torch.tensor([count for count, _ in ranks], dtype=torch.float64, device=runtime.device)
    for name, one in metrics.items():
        for path, metric in _parts(name, one):
            _reduce(metric, [states[path] for _, states in ranks], counts, runtime.device)


def _parts(name: str, metric: Metric) -> list[tuple[str, Metric]]:
    """A metric and those that it holds, as wrappers and compositions do."""
    return [
        (f"{name}.{path}", part)
        for path, part in metric.named_modules()
        if isinstance(part, Metric)
    ]


def _states(metric: Metric) -> dict[str, Any]:
    states = {"_update_count": metric._update_count}
    for name in metric._reductions:
        value = getattr(metric, name)
        states[name] = mapped(value, lambda tensor: tensor.detach().cpu())
    return states


def _reduce(
    metric: Metric, ranks: list[dict[str, Any]], counts: Tensor, device: torch.device
) -> None:
    """Set the states of `metric` to those of `ranks` together, which have seen `counts` samples (R,)."""
    for name, reduction in metric._reductions.items():
        values = [mapped(rank[name], lambda tensor: tensor.to(device)) for rank in ranks]
        setattr(metric, name, _together(values, reduction, counts))
    metric._update_count = sum(rank["_update_count"] for rank in ranks)
    metric._computed = None


def _together(values: list[Any], reduction: Any, counts: Tensor) -> Any:
    """One state of all ranks, as torchmetrics reduces it where every rank has samples."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], list):
        items = [item for value in values for item in value]
        own = reduction in (None, dim_zero_cat) or not items
        return items if own or reduction is None else reduction(items)
    if reduction is dim_zero_mean:
        stack = torch.stack(values)
        weights = (counts / counts.sum()).view(-1, *[1] * (stack.dim() - 1))
        return (stack.double() * weights).sum(0).to(stack.dtype)
    if reduction is dim_zero_cat:
        return dim_zero_cat([torch.atleast_1d(value) for value in values])
    stack = torch.stack(values)
    return stack if reduction is None else reduction(stack)


def _gathered(value: Any, runtime: Runtime) -> list[Any]:
    """Every rank's `value`, in the order of ranks."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    own = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    return [
        torch.load(io.BytesIO(of_rank.cpu().numpy().tobytes()), weights_only=True)
        for of_rank in runtime.gather(own.to(runtime.device))
    ]
