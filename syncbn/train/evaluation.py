"""Measuring a model on a split that all ranks share out, with the statistics its arm prescribes."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from syncbn.errors import NonFinite, UsageError
from syncbn.norm import RanksDisagree
from syncbn.runtime.base import Runtime
from syncbn.tasks import Task, measures_of


def settle_buffers(model: nn.Module, arm: str, runtime: Runtime) -> None:
    """Give every rank the running statistics that arm `arm` evaluates with.

    `local_avg` averages them over ranks. All others take rank 0's, which is what DistributedDataParallel's
    broadcast before each forward amounts to; those of `sync` must have been equal.

    Raises:
        RanksDisagree: arm `sync` whose running statistics differ between ranks; names the first buffer.
    """
    differs = dict.fromkeys((name for name, _ in model.named_buffers()), False)
    for name, buffer in model.named_buffers():
        if arm == "local_avg" and buffer.is_floating_point():
            runtime.sum(buffer).div_(runtime.world_size)
        else:
            own = buffer.clone()
            differs[name] = not _equal(own, runtime.from_main(buffer))
    if arm == "sync":
        _refuse_differing(differs, runtime)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal, NaN to itself."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _refuse_differing(differs: dict[str, bool], runtime: Runtime) -> None:
    flags = torch.tensor(list(differs.values()), dtype=torch.float64, device=runtime.device)
    for name, count in zip(differs, runtime.sum(flags).tolist(), strict=True):
        if count:
            raise RanksDisagree(f"running statistics {name!r} differ between ranks")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    batches: Iterable[tuple[Tensor, Tensor]],
    runtime: Runtime,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The measures of `task` for `model` over all ranks' `batches`, as `test_<name>`: `test_loss` and others.

    Sums and the number of samples are added over ranks, so that the means are exact however unevenly samples are
    shared; a rank without any has one empty batch.

    Raises:
        NonFinite: the loss is NaN or infinite.
        UsageError: neither `loss` nor the measure that decides is among the task's.
    """
    model.eval()
    names: list[str] = []
    totals = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for x, y in batches:
        y = y.to(runtime.device, non_blocking=True)
        output = model(x.to(runtime.device, dtype, non_blocking=True))
        found = measures_of(task, output, y)
        count = torch.tensor(float(task.num_samples(y)), device=runtime.device)
        names = list(found)
        totals = totals + torch.stack([*found.values(), count.double()])
    model.train()
    *sums, num_samples = runtime.sum(totals).tolist()
    means = {name: value / num_samples for name, value in zip(names, sums, strict=True)}
    _check_measures(task, means)
    return {f"test_{name}": value for name, value in means.items()}


def _check_measures(task: Task, means: dict[str, float]) -> None:
    for needed in ("loss", task.decides):
        if needed not in means:
            raise UsageError(
                f"{type(task).__name__}.measures gives {', '.join(means)}: {needed!r} must be among them"
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
