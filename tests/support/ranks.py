"""A pool of rank processes that stays up between tests: importing torch once a rank, not once a test."""

import importlib
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any

from torch.distributed import TCPStore

TIMEOUT_S = 300.0
GLOO_TIMEOUT_S = 120.0
"""Both only bound what hangs: four ranks on a busy machine of two cores take a minute to import torch."""


class RankFailed(AssertionError):
    """What the ranks said, when a test failed on some of them."""


class RankPool:
    """Up to four processes, each of which can be any rank of a gloo group made for one test.

    Args:
        environment: variables that the processes have beside this one's.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def run(self, module: str, function: str, kwargs: dict[str, Any], world_size: int) -> None:
        """Call `module.function(**kwargs)` on every rank; raise when it fails, dies or hangs on any.

        Keyword arguments are plain values: tensors would travel as shared file descriptors.
        """
        while len(self._workers) < world_size:
            self._workers.append(_start(self._environment))
        try:
            # of this process, and gone once all ranks have answered: a store of files would have those wait that
            # still look into it then
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for rank, (_, connection) in enumerate(self._workers[:world_size]):
                connection.send((module, function, kwargs, rank, world_size, store.port))
            failures = self._failures(world_size)
            if failures:
                raise RankFailed("\n".join(failures))
        except BaseException:  # also a timeout of pytest's: no test gets the answers of another
            self.close(kill=True)
            raise

    def _failures(self, world_size: int) -> list[str]:
        deadline = time.monotonic() + TIMEOUT_S
        failures = []
        for rank in range(world_size):
            process, connection = self._workers[rank]
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank} hangs after {TIMEOUT_S:g} s")
                    continue
                error = connection.recv()
            except EOFError:
                error = f"died with exit code {process.wait()}"
            if error is not None:
                failures.append(f"rank {rank}: {error}")
        return failures

    def close(self, kill: bool = False) -> None:
        """End the processes: by closing their pipe, or with `kill` at once."""
        for process, connection in self._workers:
            connection.close()
            if kill:
                process.kill()
        for process, _ in self._workers:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._workers = []


def _start(extra: dict[str, str]) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    command = [sys.executable, __file__, str(theirs.fileno()), *sys.path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | extra
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    return process, ours


def _serve(connection: Connection) -> None:
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(*task))


def _attempt(
    module: str, function: str, kwargs: dict[str, Any], rank: int, world_size: int, port: int
) -> str | None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            store=TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=GLOO_TIMEOUT_S),
        )
        getattr(importlib.import_module(module), function)(**kwargs)
        dist.barrier()  # a rank that leaves early breaks the connections others are still making
    except BaseException:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return None


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton_interpreter import patch_language_once

        patch_language_once()
    _serve(Connection(int(sys.argv[1])))
