"""Measuring a model on a split that all ranks share out, with the statistics its arm prescribes."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.errors import NonFinite, UsageError
from syncbn.norm import RanksDisagree
from syncbn.runtime.base import Runtime
from syncbn.structure import count, doubled, moved
from syncbn.tasks import (
    Task,
    computed,
    measures_of,
    metrics_of,
    outputs_of,
    update_of,
    weight_of,
)


@torch.no_grad()
def settle_buffers(model: nn.Module, arm: str, runtime: Runtime) -> None:
    """Give every rank the running statistics that arm `arm` evaluates with (`settled_buffers`)."""
    settled = settled_buffers(model, arm, runtime)
    for name, buffer in model.named_buffers():
        buffer.copy_(settled[name])


@torch.no_grad()
def settled_buffers(model: nn.Module, arm: str, runtime: Runtime) -> dict[str, Tensor]:
    """The running statistics that arm `arm` evaluates with, by name and equal on all ranks; a collective.

    `local_avg` averages them over ranks. All others take rank 0's, which is what DistributedDataParallel's
    broadcast before each forward amounts to; those of `sync` must have been equal.

    Raises:
        RanksDisagree: arm `sync` whose running statistics differ between ranks; names the first buffer.
    """
    settled, differs = {}, {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        settled[name], differs[name] = buffer.clone(), False
        if arm == "local_avg" and buffer.is_floating_point():
            runtime.sum(settled[name]).div_(runtime.world_size)
        else:
            differs[name] = not _equal(buffer, runtime.from_main(settled[name]))
    if arm == "sync":
        _refuse_differing(differs, runtime)
    return settled


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal, NaN to itself."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _refuse_differing(differs: dict[str, bool], runtime: Runtime) -> None:
    flags = torch.tensor(list(differs.values()), dtype=torch.float64, device=runtime.device)
    for name, differing in zip(differs, runtime.sum(flags).tolist(), strict=True):
        if differing:
            raise RanksDisagree(f"running statistics {name!r} differ between ranks")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[tuple[Any, Any]],
    runtime: Runtime,
    dtype: torch.dtype,
    num_classes: int,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measures and metrics of `task` for `model` over all ranks' `batches`, by name: numbers and tables.

    Numbers are called `test_<name>`. Tables are nested lists, of metrics that are no single number.

    Sums and the weight of samples are added over ranks, so that the means are exact however unevenly samples are
    shared; a rank without any has one empty batch.

    Raises:
        NonFinite: the loss is NaN or infinite.
        UsageError: `loss` or the measure that decides is not among the task's, or the task fails.
    """
    model.eval()
    names: list[str] = []
    totals = torch.zeros((), dtype=torch.float64, device=runtime.device)
    metrics, num_samples = _new_metrics(task, num_classes, runtime), 0
    for x, y in batches:
        y = moved(y, runtime.device)
        output = outputs_of(task, model, moved(x, runtime.device, dtype), y)
        found = measures_of(task, output, y)
        weight = weight_of(task, y).to(runtime.device)
        names = list(found)
        totals = totals + torch.stack([*found.values(), weight])
        if metrics and count(y):
            num_samples += count(y)
            update_of(task, metrics, doubled(output), doubled(y))
    model.train()
    _refuse_other_names(task, [*names, *metrics], runtime)
    *sums, whole = runtime.sum(totals).tolist()
    means = {
        name: value / whole if whole else math.nan for name, value in zip(names, sums, strict=True)
    }
    values = _values(task, metrics, num_samples, runtime)
    numbers = means | {name: value for name, value in values.items() if isinstance(value, float)}
    _check_measures(task, means, numbers)
    tables = {name: value for name, value in values.items() if name not in numbers}
    return {f"test_{name}": value for name, value in numbers.items()}, tables


def _refuse_other_names(task: Task, names: list[str], runtime: Runtime) -> None:
    """Raise `RanksDisagree` where ranks measure different things, whose sums would not end."""
    if runtime.world_size == 1:
        return
    text = torch.frombuffer(
        bytearray(" ".join(names).encode()) or bytearray(b" "), dtype=torch.uint8
    )
    told = [bytes(row.tolist()).decode() for row in runtime.gather(text.to(runtime.device))]
    for rank, theirs in enumerate(told):
        if theirs != told[0]:
            raise RanksDisagree(
                f"measures and metrics of the task {type(task).__name__} differ: rank 0 has {told[0]}, rank {rank} has "
                f"{theirs}: every rank must give the same names in one order"
            )


def _new_metrics(task: Task, num_classes: int, runtime: Runtime) -> dict[str, Any]:
    metrics = metrics_of(task, num_classes)
    if not metrics:
        return metrics
    from syncbn.train.metrics import prepared  # torchmetrics: 1 s, which only this needs

    return prepared(metrics, runtime.device)


def _values(
    task: Task, metrics: dict[str, Any], num_samples: int, runtime: Runtime
) -> dict[str, Any]:
    """What `metrics` have found over all ranks: a number, a nested list, or several by `name_key`."""
    if not metrics:
        return {}
    from syncbn.train.metrics import reduce_over_ranks

    reduce_over_ranks(metrics, num_samples, runtime)
    found: dict[str, Any] = {}
    for name, metric in metrics.items():
        value = computed(task, name, metric)
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}_{key}" if key else name: _plain(torch.as_tensor(v)) for key, v in parts}
    return found


def _plain(value: Tensor) -> Any:
    """A number where `value` has one element, else nested lists."""
    return float(value) if value.numel() == 1 else value.tolist()


def _check_measures(task: Task, means: dict[str, float], numbers: dict[str, float]) -> None:
    for needed, given in (("loss", means), (task.decides, numbers)):
        if needed not in given:
            raise UsageError(
                f"{type(task).__name__}.measures gives {', '.join(given)}: {needed!r} must be among them"
            )
    if not math.isfinite(means["loss"]):
        raise NonFinite("the test loss is not finite: the model has diverged, lower optim.lr")


def own_batches(num_samples: int, runtime: Runtime, batch: int) -> Iterator[Tensor]:
    """The samples that this rank evaluates, every W-th, in batches of indices.

    Every rank has equally many batches, because forward passes may gather parameters from all ranks. A rank that would
    have one less cuts its last in two, and one without samples has an empty batch.
    """
    own = torch.arange(num_samples)[runtime.rank :: runtime.world_size]
    *full, last = own.split(batch)
    most = -(-num_samples // runtime.world_size)  # samples of rank 0
    yield from full
    yield from last.tensor_split(max(1, -(-most // batch)) - len(full))
