"""Ranks in processes of their own, for tests after which no rank could run another test."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from ranks import COVERAGE, GLOO_TIMEOUT_S, TIMEOUT_S, start_coverage


class Outcome(NamedTuple):
    """How a rank ended."""

    returncode: int
    output: str


def run_ranks(module: str, function: str, *arguments: str, world_size: int = 2) -> list[Outcome]:
    """Call `module.function(*arguments)` in each of `world_size` processes, ranks of one gloo group.

    They are forks of one that has imported torch; none outlives the call.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    coverage = environment.pop(COVERAGE, "")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, coverage, os.pathsep.join(sys.path), folder]
        forks = subprocess.Popen(
            [*command, str(world_size), module, function, *arguments],
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            codes = json.loads(forks.communicate(timeout=TIMEOUT_S)[0])
        finally:
            with suppress(ProcessLookupError):
                os.killpg(forks.pid, signal.SIGKILL)
            forks.wait()
        outputs = [_output(folder, rank).read_text() for rank in range(world_size)]
    return [Outcome(code, output) for code, output in zip(codes, outputs, strict=True)]


def _output(folder: str, rank: int) -> Path:
    return Path(folder) / f"output-{rank}"


def _main(
    coverage: str, path: str, folder: str, world_size: str, module: str, function: str, *rest: str
) -> None:
    import torch
    import torch.distributed as dist

    sys.path[:] = path.split(os.pathsep)  # test modules are imported as the parent imports them
    torch.set_num_threads(1)
    size = int(world_size)
    pids: list[int] = []
    while len(pids) < size and (pid := os.fork()):
        pids.append(pid)
    rank = len(pids)
    if rank == size:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        sys.stdout.write(json.dumps(codes))
        return
    with _output(folder, rank).open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    start_coverage(coverage)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=GLOO_TIMEOUT_S),
    )
    getattr(importlib.import_module(module), function)(*rest)
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
