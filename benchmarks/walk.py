"""How far a training pass walks through the layer's code: `torchrun --nproc-per-node 2 -m benchmarks.walk`.

One pass of `SyncBatchNorm`, forward and backward, is followed with `sys.settrace` on rank 0, after passes that fill the
caches. It prints the Python files of `syncbn/norm` that the pass enters, in order, and how often it changes from one to
another, calls and returns both counted.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import syncbn
from syncbn.norm import module

PACKAGE = Path(module.__file__).parent


class Walk:
    """The files of `syncbn/norm` in the order in which they are entered."""

    def __init__(self) -> None:
        self.stops: list[str] = []

    def follow(self, work: Callable[[], object]) -> None:
        """Run `work`, and note each file that it enters or comes back to."""
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            work()
        finally:
            sys.settrace(before)

    @property
    def files(self) -> list[str]:
        """Each file once, in order."""
        return list(dict.fromkeys(self.stops))

    @property
    def num_changes(self) -> int:
        """How often one file follows another."""
        return len(self.stops) - 1

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        del argument
        file = Path(frame.f_code.co_filename)
        if PACKAGE not in file.parents:
            return None
        if event == "call":
            self._note(file)
            frame.f_trace_lines = False
        elif event == "return":
            self._come_back(frame.f_back)
        return self._trace

    def _come_back(self, frame: FrameType | None) -> None:
        while frame is not None and PACKAGE not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back
        if frame is not None:
            self._note(Path(frame.f_code.co_filename))

    def _note(self, file: Path) -> None:
        name = str(file.relative_to(PACKAGE))
        if not self.stops or self.stops[-1] != name:
            self.stops.append(name)


def walk() -> Walk:
    """Follow one pass of a layer, on the group that is there."""
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(8)
    x, dy = torch.randn(2, 4, 8, 6, 6).unbind()
    x.requires_grad_()
    walk = Walk()
    for _ in range(3):
        layer(x).backward(dy)
    walk.follow(lambda: layer(x).backward(dy))
    return walk


def main() -> None:
    """Print the walk of rank 0."""
    dist.init_process_group("gloo")
    found = walk()
    if dist.get_rank() == 0:
        print("\n".join(found.stops))
        print(f"{len(found.files)} files, {found.num_changes} changes from one file to another")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
