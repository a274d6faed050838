"""A pool of rank processes that stays up between tests: importing torch once a pool, not once a test or rank."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

TIMEOUT_S = 300.0
GLOO_TIMEOUT_S = 120.0
"""Both only bound what hangs: four ranks on a busy machine of two cores take a minute to import torch."""
MOST_RANKS = 4
PRELOADED = ("torch.distributed", "torch._dynamo", "pytest", "hypothesis")
"""What tests import, but for syncbn, whose imports are traced; torch's optimizers and DDP import the compiler."""
COVERAGE = "COVERAGE_PROCESS_CONFIG"
"""Where coverage looks whether to trace a process."""


class RankFailed(AssertionError):
    """What the ranks said, when a test failed on some of them."""


class RankPool:
    """Processes, each of which can be any rank of a gloo group made for one test.

    They are forks of one that has imported torch: four imports take 9 s of processor time.

    Args:
        environment: variables that the processes have beside this one's.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._forks: subprocess.Popen[bytes] | None = None
        """The process that the ranks are forks of, which ends with the last of them."""
        self._connections: list[Connection] = []
        self._pids: list[int] = []

    def run(self, module: str, function: str, kwargs: dict[str, Any], world_size: int) -> None:
        """Call `module.function(**kwargs)` on every rank; raise when it fails, dies or hangs on any.

        Keyword arguments are plain values: tensors would travel as shared file descriptors.
        """
        assert world_size <= MOST_RANKS
        if self._forks is None:
            self._start()
        try:
            # of this process, and gone once all ranks have answered: a store of files would have those wait that
            # still look into it then
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            for rank, connection in enumerate(self._connections[:world_size]):
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
        for rank, connection in enumerate(self._connections[:world_size]):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank} hangs after {TIMEOUT_S:g} s")
                    continue
                error = connection.recv()
            except EOFError:
                error = "died"
            if error is not None:
                failures.append(f"rank {rank}: {error}")
        return failures

    def _start(self) -> None:
        pipes = [Pipe() for _ in range(MOST_RANKS)]
        theirs = [pipe[1].fileno() for pipe in pipes]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | self._environment
        coverage = environment.pop(COVERAGE, "")
        command = [sys.executable, __file__, coverage, *map(str, theirs), *sys.path]
        self._forks = subprocess.Popen(command, pass_fds=theirs, env=environment)
        for _, their in pipes:
            their.close()
        self._connections = [ours for ours, _ in pipes]
        self._pids = [connection.recv() for connection in self._connections]

    def close(self, kill: bool = False) -> None:
        """End the processes: by closing their pipe, or with `kill` at once."""
        for connection in self._connections:
            connection.close()
        if self._forks is not None:
            if kill:
                self._kill()
            try:
                self._forks.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._kill()
                self._forks.wait()
        self._forks, self._connections, self._pids = None, [], []

    def _kill(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def started_by_torchrun() -> Iterator[dict[str, str]]:
    """In ranks of a pool: as torchrun starts them, without a group, and with what it tells them in their environment.

    Yields:
        The variables. The group of the pool is gone for the rest of the test.
    """
    import torch.distributed as dist

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ports = [store.port]
    dist.broadcast_object_list(ports)
    dist.destroy_process_group()
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0]), "WORLD_SIZE": size, "RANK": rank,
            "LOCAL_WORLD_SIZE": size, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    with mock.patch.dict(os.environ, told):
        yield told


def start_coverage(config: str) -> None:
    """Have coverage trace this fork of a process that it does not trace, by its `config`; "" is none."""
    if config:
        os.environ[COVERAGE] = config
        importlib.import_module("coverage").process_startup(force=True)


def _fork(coverage: str, descriptors: list[int]) -> None:
    """Serve each of `descriptors` in a process of its own, and wait for their ends."""
    for descriptor in descriptors:
        if os.fork() == 0:
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            start_coverage(coverage)
            _serve(Connection(descriptor))
            os._exit(0)  # coverage saves first; to take the interpreter down is 1 s of work a rank
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def _serve(connection: Connection) -> None:
    connection.send(os.getpid())
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
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early breaks the connections others are still making
    except BaseException:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return None


def _main(coverage: str, *rest: str) -> None:
    descriptors = [int(descriptor) for descriptor in rest[:MOST_RANKS]]
    sys.path[:] = rest[MOST_RANKS:]
    for name in PRELOADED:
        importlib.import_module(name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton_interpreter import patch_language_once

        patch_language_once()
    _fork(coverage, descriptors)


if __name__ == "__main__":
    _main(*sys.argv[1:])
