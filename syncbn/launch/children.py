"""Reports of ranks on this machine to the process that started them, each in the file that torchrun's agent gives it.

The agent reports the first process that it finds dead, which need not be the one that failed first. So every rank
reports how it ended, success too, and a rank without a report is known to have been killed.
"""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syncbn.errors import (
    InfrastructureError,
    RankFailed,
    Stopped,
    SyncbnError,
    exit_code,
    in_words,
    of_rank,
)
from syncbn.launch.outcomes import LOST, kind
from syncbn.train.stopping import stop_on_signals

Reports = dict[int, dict[str, Any]]
"""What ranks said of their end, those that came to say anything."""


@contextmanager
def told() -> Iterator[None]:
    """Leave the outcome of what is within behind for `reports_in`; end the process with a failure's exit code.

    The agent ends all ranks once one has: its signal must not come between a rank's failure and its word of it.
    """
    with stop_on_signals():
        try:
            yield
        except BaseException as error:
            _tell(_report(exit_code(error), in_words(error), _details(error), of_rank(error)))
            raise SystemExit(exit_code(error)) from None
        _tell(_report(0, "done", ""))


def _tell(report: dict[str, Any]) -> None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        beside = Path(f"{file}.part")
        beside.write_text(json.dumps(report))
        beside.replace(file)


def _details(error: BaseException) -> str:
    """The traceback, that of another rank where `error` came from there."""
    return getattr(error, "details", "") or traceback.format_exc()


def _report(code: int, message: str, details: str, rank: int | None = None) -> dict[str, Any]:
    """An outcome in the form that torchrun's agent reads, with our own fields beside it: `rank` is whose failure."""
    extra = {"py_callstack": details, "timestamp": str(int(time.time()))}
    return {
        "message": {"message": message, "extraInfo": extra},
        "exit_code": code,
        "rank": rank,
        "time": time.time(),
    }


def reports_in(folder: Path) -> Reports:
    """What the ranks of an agent with the log folder `folder` told, by rank."""
    return {
        int(path.parent.name): json.loads(path.read_text())
        for path in folder.glob("*/attempt_0/*/error.json")
    }


def failure(reports: Reports, num_ranks: int) -> SyncbnError:
    """Why `num_ranks` ranks, some of which failed, did: see `outcomes`."""
    failed = [report for report in reports.values() if report["exit_code"]]
    failed.sort(key=lambda report: (kind(report["exit_code"]), report["time"]))
    dead = [str(rank) for rank in range(num_ranks) if rank not in reports]
    if dead and not (failed and kind(failed[0]["exit_code"]) < LOST):
        return InfrastructureError(
            f"rank {', '.join(dead)} died: start it again to continue from its checkpoint"
        )
    if not failed:
        return InfrastructureError("a rank died at its end: start it again")
    told = failed[0]["message"]
    details, rank = told["extraInfo"]["py_callstack"], failed[0].get("rank")
    alike = len({report["message"]["message"] for report in failed}) == 1
    same = alike and len({report.get("rank") for report in failed}) > 1  # each failed by itself
    return RankFailed(told["message"], failed[0]["exit_code"], details, None if same else rank)


def after_signal(signal_number: int, reports: Reports, num_ranks: int) -> SyncbnError:
    """How ranks ended that a signal was handed on to: stopped, unless one says that something else went wrong.

    Rank 0 writes checkpoints, so it is the one to say whether there is one.
    """
    codes = {rank: report["exit_code"] for rank, report in reports.items()}
    if any(code and kind(code) < LOST for code in codes.values()):
        return failure(reports, num_ranks)
    said = reports[0]["message"]["message"] if 0 in reports else ""
    return Stopped(signal_number, saved=codes.get(0) == 0 or said == str(Stopped(signal_number)))
