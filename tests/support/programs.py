"""Running the project's programs as a user does, and looking for what they leave behind."""

import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from syncbn.cli import cli
from syncbn.cli.guard import invoke
from syncbn.tracking import read_journal

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
BIN = Path(sys.executable).parent
TRAIN = (sys.executable, str(ROOT / "jobs" / "train.py"))
COMPARE = (sys.executable, str(ROOT / "jobs" / "compare.py"))
SYNCBN = (str(BIN / "syncbn"),)
HANGS_S = 500.0
"""What takes this long hangs, on a busy machine too."""


@dataclass
class Bench:
    """A place to run programs: a folder of its own, a home of its own, and a mark on every process.

    Timeouts only bound what hangs; the fixture `bench` kills what a failing test leaves.
    """

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, *command, cwd=None, stdout=subprocess.PIPE, timeout=HANGS_S):
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )

    def call(self, *words, cwd=None):
        """`syncbn` with `words` in this process: for promises that are not about one of its own.

        What modules of its folder register is left; the fixture `own_registrations` takes it away.
        """
        out, err = io.StringIO(), io.StringIO()
        before = set(sys.modules)
        with (
            mock.patch.dict(os.environ, self.environment(), clear=True),
            mock.patch.object(sys, "path", [p for p in sys.path if p]),
            contextlib.chdir(cwd or self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = invoke(cli, words, prog_name="syncbn")
        for name in set(sys.modules) - before:
            if str(self.folder) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def environment(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(self.folder), "SYNCBN_TEST_MARK": self.mark, "NO_COLOR": "1"}
        return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | own | self.environ

    def start(self, *command, **options):
        """`command` in the background, in a session of its own."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(),
            text=True,
            start_new_session=True,
            **options,
        )

    def left_running(self, patience_s=60.0):
        """Command lines of the processes that carry the mark, once they had time to end by themselves."""
        limit = time.monotonic() + patience_s
        while (pids := self._pids()) and time.monotonic() < limit:
            time.sleep(0.05)
        return [cmdline(pid) for pid in pids]

    def kill_all(self):
        """End every process that carries the mark, also those that are started meanwhile."""
        while pids := self._pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _pids(self):
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._marked(path)]

    def _marked(self, process):
        try:
            return f"SYNCBN_TEST_MARK={self.mark}".encode() in (process / "environ").read_bytes()
        except OSError:
            return False


@contextmanager
def killed(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """`process`, which is killed and reaped at the end where it has not ended by itself."""
    with process:  # reaps it
        try:
            yield process
        finally:
            process.kill()


def wait_until(true: Callable[[], object], timeout_s: float = HANGS_S) -> None:
    """Return once `true()` holds; fail where it does not in `timeout_s` seconds, which only bound a hang."""
    limit = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)


def free_port() -> int:
    """A port of loopback for a server that must be told one: free, and none that the system gives by itself."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return ""


def losses(run_folder):
    """(step, training loss) of a run, exactly as written; the run may be writing still."""
    return [
        (record["step"], record["metrics"]["train_loss"])
        for record in read_journal(run_folder / "journal.jsonl")
        if "train_loss" in record.get("metrics", {})
    ]


def complaint(result):
    """The one line that a failed program said on stderr."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("syncbn: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def torchrun(world_size="2", rank="0", **more):
    """The environment that torchrun gives one of its processes."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {"WORLD_SIZE": world_size, "RANK": rank, **address, **more}
