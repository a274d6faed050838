"""Contenders: a registry of layers, and of the memory passes that no layer can do without.

A contender makes, for one input, a function that runs it forward and backward once. Peers may be missing or refuse
an input; they are then left out of that case, saying so.
"""

import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import syncbn
from benchmarks.cases import Case
from benchmarks.naive import NaiveSyncBatchNorm

Run = Callable[[], object]
NUM_GRADIENTS = 2
"""Random upstream gradients that take turns; the gradient of a plain sum would be 0 after any batch norm."""

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "ours": lambda channels: syncbn.SyncBatchNorm(channels),
    "ours_sockets": lambda channels: _ours_by("sockets", channels),
    "ours_gloo": lambda channels: _ours_by("gloo", channels),
    "local": nn.BatchNorm2d,
    "naive": NaiveSyncBatchNorm,
    "fairscale": lambda channels: _fairscale(channels),
}
PEERS = {"fairscale": "fairscale"}
"""Contenders that need a package of their own, by its name."""


def installed(names: Sequence[str]) -> list[str]:
    """Those of `names` whose packages are there."""
    return [n for n in names if n not in PEERS or importlib.util.find_spec(PEERS[n]) is not None]


def runs_for(case: Case, names: Sequence[str]) -> dict[str, Run]:
    """A function for each of `names` that does one forward and backward pass over `case`."""
    x = case.tensor(requires_grad=True)
    gradients = [case.tensor() for _ in range(NUM_GRADIENTS)]
    runs: dict[str, Run] = {}
    for name in names:
        made = FLOORS[name](x.detach(), gradients[0]) if name in FLOORS else None
        run = made or forward_backward(LAYERS[name](case.shape[1]), x, gradients)
        if _works(name, run):
            runs[name] = run
    return runs


def forward_backward(layer: Callable[..., Tensor], x: Tensor, gradients: Sequence[Tensor]) -> Run:
    """One pass each way; results are dropped inside the measured time, as a training step does."""
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    upstream = itertools.cycle(gradients)

    def run() -> None:
        torch.autograd.grad(layer(x), [x, *parameters], next(upstream))

    return run


def _works(name: str, run: Run) -> bool:
    """Whether a peer accepts the input; an error of ours passes through."""
    if name not in PEERS:
        return True
    try:
        run()
    except (RuntimeError, TypeError, ValueError) as error:
        print(f"  left out: {name}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


@functools.cache
def group_by(way: str) -> ProcessGroup:
    """All ranks once more, in a group whose exchange goes one `way`; the choice falls at its first use.

    Args:
        way: a value of `SYNCBN_EXCHANGE`.

    Raises:
        RuntimeError: these ranks cannot go that way.
    """
    group = dist.new_group()
    assert isinstance(group, ProcessGroup)
    before = os.environ.get("SYNCBN_EXCHANGE")
    os.environ["SYNCBN_EXCHANGE"] = way
    try:
        syncbn.sync_batch_norm(torch.randn(4, 1), process_group=group)
    finally:
        if before is None:
            del os.environ["SYNCBN_EXCHANGE"]
        else:
            os.environ["SYNCBN_EXCHANGE"] = before
    return group


def _ours_by(way: str, channels: int) -> nn.Module:
    return syncbn.SyncBatchNorm(channels, process_group=group_by(way))


def _fairscale(channels: int) -> nn.Module:
    return importlib.import_module("fairscale.experimental.nn").SyncBatchNorm(channels)


def memory_passes(x: Tensor, dy: Tensor, fresh: bool) -> Run:
    """The eight passes over memory of a layer's forward and backward.

    They read x; read x and write y; read x and dy; read both and write dx. Each group is one vectorised operation
    of torch's: dot, copy, dot, add. Half precision is moved as if it were float32 of half as many values, since only
    bytes count here.

    Args:
        x: the input.
        dy: of the same shape and layout.
        fresh: write to newly allocated memory, as a layer must, rather than to the same each time.
    """
    flat_x, flat_dy = (_flat(t) for t in (x, dy))
    kept = torch.empty_like(flat_x), torch.empty_like(flat_x)

    def run() -> None:
        y, dx = (torch.empty_like(flat_x), torch.empty_like(flat_x)) if fresh else kept
        torch.dot(flat_x, flat_x)
        y.copy_(flat_x)
        torch.dot(flat_x, flat_dy)
        torch.add(flat_x, flat_dy, out=dx)

    return run


def _flat(values: Tensor) -> Tensor:
    """All values as one float32 vector, in the order in which they lie in memory."""
    return values.as_strided((values.numel(),), (1,)).view(torch.float32)


FLOORS: Mapping[str, Callable[[Tensor, Tensor], Run]] = {
    "floor": lambda x, dy: memory_passes(x, dy, fresh=False),
    "floor_fresh": lambda x, dy: memory_passes(x, dy, fresh=True),
}
"""Not layers, but what every layer must at least do."""
