"""Running the project's programs as a user does, and looking for what they leave behind."""

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
BIN = Path(sys.executable).parent
TRAIN = (sys.executable, str(ROOT / "jobs" / "train.py"))
COMPARE = (sys.executable, str(ROOT / "jobs" / "compare.py"))
SYNCBN = (str(BIN / "syncbn"),)


@dataclass
class Bench:
    """A place to run programs: a folder of its own, a home of its own, and a mark on every process."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, *command, stdout=subprocess.PIPE, timeout=150):
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )

    def environment(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"HOME": str(self.folder), "SYNCBN_TEST_MARK": self.mark, "NO_COLOR": "1"}
        return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | own | self.environ

    def left_running(self):
        """Command lines of the processes that still carry the mark."""
        return [
            cmdline(int(path.name)) for path in Path("/proc").glob("[0-9]*") if self._marked(path)
        ]

    def _marked(self, process):
        try:
            return f"SYNCBN_TEST_MARK={self.mark}".encode() in (process / "environ").read_bytes()
        except OSError:
            return False


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return ""


def losses(run_folder):
    """(step, training loss) of a run, exactly as written."""
    lines = (run_folder / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [
        (r["step"], r["metrics"]["train_loss"])
        for r in records
        if "train_loss" in r.get("metrics", {})
    ]


def complaint(result):
    """The one line that a failed program said on stderr."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("syncbn: error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]
