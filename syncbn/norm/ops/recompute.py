"""The statistics of forward passes that activation checkpointing may run again.

`torch.utils.checkpoint` computes a forward pass a second time while the backward pass runs. The replay must
normalise with the statistics of the first time, and neither exchange nor count anything again. It is recognised by
its moments: a replay has the same input, so this rank's moments are the same to the bit.

The graph of the first pass owns what is remembered; where the graph goes, the memory goes.
"""

import weakref

import torch
from torch import Tensor, nn

from syncbn.norm.moments import Block, Statistics


class Remembered:
    """What one forward pass found: this rank's packed moments, and the statistics over all ranks."""

    def __init__(self, own: Tensor, statistics: Statistics) -> None:
        self.own = own
        self.statistics = statistics

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """As in `Block`."""
        total, mean, var, invstd = (values.data_ptr() for values in self.statistics)
        return total, self.own.data_ptr(), mean, var, invstd


Found = Remembered | Block
"""What one forward pass found, in several tensors or in one."""


class Replays:
    """The forward passes of one layer whose graphs are alive."""

    def __init__(self) -> None:
        self._passes: list[weakref.ref[Found]] = []
        self._enough = 16

    def keep(self, found: Found) -> None:
        """Find this pass for as long as `found` lives."""
        # a WeakSet's own housekeeping costs more, at every pass
        if len(self._passes) >= self._enough:
            self._passes = [ref for ref in self._passes if ref() is not None]
            self._enough = 2 * len(self._passes) + 16
        self._passes.append(weakref.ref(found))

    def alive(self) -> list[Found]:
        """The passes that are kept."""
        return [found for ref in self._passes if (found := ref()) is not None]

    def recall(self, own: Tensor) -> Statistics | None:
        """The statistics of the pass whose moments were `own`; None where there was none.

        On CUDA nothing is compared on the host, which would stall it: the pass is chosen on the device, and one
        that matches none fails there.
        """
        passes = [p for p in self.alive() if p.own.shape == own.shape]
        if own.is_cuda and passes:
            return _chosen_on_device(own, passes)
        return next((p.statistics for p in passes if torch.equal(p.own, own)), None)


def replaying() -> bool:
    """Whether a backward pass is running: a forward pass inside one is a replay."""
    return torch._C._current_graph_task_id() != -1


def replays_of(layer: nn.Module) -> Replays:
    """The one `Replays` of `layer`, kept beside it: a layer's state is what torch's BatchNorm has, no more."""
    found = _replays.get(layer)
    if found is None:
        found = _replays[layer] = Replays()
    return found


_replays: weakref.WeakKeyDictionary[nn.Module, Replays] = weakref.WeakKeyDictionary()


def _chosen_on_device(own: Tensor, passes: list[Found]) -> Statistics:
    same = torch.stack([(p.own == own).all() for p in passes])
    torch._assert_async(same.any())  # pyright: ignore[reportPrivateImportUsage]
    chosen = same.to(torch.int64).argmax().view(1)
    columns = zip(*(p.statistics for p in passes), strict=True)
    return Statistics(*(torch.stack(c).index_select(0, chosen).squeeze(0) for c in columns))
