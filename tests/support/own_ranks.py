"""Ranks in processes of their own, for tests after which no rank could run another test."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import NamedTuple

from ranks import COVERAGE, GLOO_TIMEOUT_S, PRELOADED, TIMEOUT_S, start_coverage


class Outcome(NamedTuple):
    """How a rank ended."""

    returncode: int
    output: str


class OwnRanks:
    """A process that imports what tests import once, and whose forks are the ranks of one test each."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def run(self, task: list[str], world_size: int) -> list[int]:
        """The exit codes of `world_size` ranks that do `task`; none outlives the call."""
        if self._server is None:
            self._server = self._start()
        assert self._server.stdin is not None
        try:
            self._server.stdin.write(json.dumps([world_size, sys.path, task]).encode() + b"\n")
            self._server.stdin.flush()
            return json.loads(self._answer())
        except BaseException:  # also a timeout of pytest's
            self.close()
            raise

    def _answer(self) -> bytes:
        assert self._server is not None
        assert self._server.stdout is not None
        with DefaultSelector() as selector:
            selector.register(self._server.stdout, EVENT_READ)
            assert selector.select(TIMEOUT_S), f"ranks hang after {TIMEOUT_S:g} s"
        return self._server.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        coverage = environment.pop(COVERAGE, "")
        return subprocess.Popen(
            [sys.executable, __file__, coverage],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the process, and ranks that are left."""
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
        self._server = None


OWN_RANKS = OwnRanks()


def run_ranks(module: str, function: str, *arguments: str, world_size: int = 2) -> list[Outcome]:
    """Call `module.function(*arguments)` in each of `world_size` processes, ranks of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        codes = OWN_RANKS.run([folder, module, function, *arguments], world_size)
        outputs = [_output(folder, rank).read_text() for rank in range(world_size)]
    return [Outcome(code, output) for code, output in zip(codes, outputs, strict=True)]


def _output(folder: str, rank: int) -> Path:
    return Path(folder) / f"output-{rank}"


def _main(coverage: str) -> None:
    sys.path[:0] = [str(Path(__file__).parent)]
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        size, path, task = json.loads(line)
        pids = [_fork(coverage, rank, size, path, *task) for rank in range(size)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


def _fork(coverage: str, rank: int, size: int, path: list[str], folder: str, *task: str) -> int:
    """Start a rank; return its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with _output(folder, rank).open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        sys.path[:] = path  # test modules are imported as the parent imports them
        start_coverage(coverage)
        _be(rank, size, folder, *task)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # coverage saves first; to take the interpreter down is 1 s of work a rank


def _be(rank: int, size: int, folder: str, module: str, function: str, *rest: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
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
