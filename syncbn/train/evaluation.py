"""Measuring a model on a split that all ranks share out, with the statistics its arm prescribes."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from syncbn.data import Split
from syncbn.errors import NonFinite
from syncbn.norm import RanksDisagree
from syncbn.runtime.base import Runtime


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
    model: nn.Module, split: Split, runtime: Runtime, batch: int, dtype: torch.dtype
) -> dict[str, float]:
    """`test_loss` (mean cross-entropy) and `test_error` (a fraction) of `model` on all of `split`.

    Each rank takes every W-th sample; the sums are exact whatever the world size, since counts are summed too.

    Raises:
        NonFinite: the loss is NaN or infinite.
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    for x, y in split.batches(_own_batches(len(split), runtime, batch)):
        logits = model(x.to(runtime.device, dtype))
        y = y.to(runtime.device)
        totals += torch.stack(_sums(logits, y))
    model.train()
    loss, wrong, count = runtime.sum(totals).tolist()
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NonFinite("the test loss is not finite: the model has diverged, lower optim.lr")
    return {"test_loss": loss / count, "test_error": wrong / count}


def _own_batches(num_samples: int, runtime: Runtime, batch: int) -> Iterator[Tensor]:
    own = torch.arange(num_samples)[runtime.rank :: runtime.world_size]
    yield from own.split(batch)


def _sums(logits: Tensor, y: Tensor) -> list[Tensor]:
    """Summed loss, number of errors and number of samples, in float64."""
    loss = nn.functional.cross_entropy(logits.double(), y, reduction="sum")
    wrong = (logits.argmax(1) != y).sum()
    return [loss, wrong.double(), torch.tensor(float(len(y)), dtype=torch.float64, device=y.device)]
