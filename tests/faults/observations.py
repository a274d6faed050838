"""What a run left behind, read as one history however many attempts it took, and held against another's."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from programs import losses


@dataclass(frozen=True)
class Line:
    """One step of one rank."""

    step: int
    samples: tuple[str, ...]
    time: float


def lines_of(folder: Path, rank: int) -> list[Line]:
    """The steps that `rank` of the run in `folder` took, repeated ones too, in the order in which it did."""
    records = [record for record in _records(folder, rank) if "step" in record]
    return [Line(one["step"], tuple(one["samples"]), one["time"]) for one in records]


def pid_of(folder: Path, rank: int) -> int | None:
    """The process that is, or last was, `rank` of the run in `folder`."""
    pids = [record["pid"] for record in _records(folder, rank) if "pid" in record]
    return pids[-1] if pids else None


def num_attempts(folder: Path) -> int:
    """How often rank 0 began."""
    return sum("pid" in record for record in _records(folder, 0))


def differences(folder: Path, reference: Path, num_ranks: int) -> list[str]:
    """In what the run in `folder` is not the one in `reference`: losses and parameters byte by byte, and samples.

    A step that was taken again must have seen what it saw before.
    """
    found = []
    if losses(folder) != losses(reference):
        found.append("losses")
    if _weights(folder) != _weights(reference):
        found.append("parameters")
    for rank in range(num_ranks):
        expected = {line.step: line.samples for line in lines_of(reference, rank)}
        seen = lines_of(folder, rank)
        if {line.step for line in seen} != set(expected):
            found.append(f"steps of rank {rank}")
        if any(line.samples != expected.get(line.step) for line in seen):
            found.append(f"samples of rank {rank}")
    return found


def _weights(folder: Path) -> str:
    """The digest of the last checkpoint's parameters and buffers."""
    checkpoints = folder / "checkpoints"
    newest = checkpoints / (checkpoints / "LATEST").read_text().strip()
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def _records(folder: Path, rank: int) -> list[dict]:
    """The whole lines of the rank's file; a kill may have left half a line, with the next attempt's after it."""
    path = folder / "observed" / f"rank-{rank}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
