"""Ranks in processes of their own, for tests after which no rank could run another test."""

import importlib
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from ranks import GLOO_TIMEOUT_S, TIMEOUT_S


class Outcome(NamedTuple):
    """How a rank ended."""

    returncode: int
    output: str


def run_ranks(module: str, function: str, *arguments: str, world_size: int = 2) -> list[Outcome]:
    """Call `module.function(*arguments)` in each of `world_size` processes, ranks of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, __file__, os.pathsep.join(sys.path), store]
        ranks = [
            subprocess.Popen(
                [*command, str(world_size), str(rank), module, function, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return [Outcome(r.returncode, output) for r, output in zip(ranks, outputs, strict=True)]


def _main(
    path: str, store: str, world_size: str, rank: str, module: str, function: str, *arguments: str
) -> None:
    import torch
    import torch.distributed as dist

    sys.path[:] = path.split(os.pathsep)  # test modules are imported as the parent imports them
    torch.set_num_threads(1)
    size = int(world_size)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=int(rank),
        world_size=size,
        timeout=timedelta(seconds=GLOO_TIMEOUT_S),
    )
    getattr(importlib.import_module(module), function)(*arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
