"""Reports of ranks on this machine to the process that started them, each in the file that torchrun's agent gives it.

The agent reports the first process that it finds dead, which need not be the one that failed first. So every rank
reports how it ended, success too, and a rank without a report is known to have been killed.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from syncbn.errors import (
    START_AGAIN,
    InfrastructureError,
    RankFailed,
    Stopped,
    SyncbnError,
    class_of,
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
            _tell(_report_of(error))
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


def _report_of(error: BaseException) -> dict[str, Any]:
    said = (exit_code(error), in_words(error), _details(error))
    return _report(*said, of_rank(error), class_of(error))


def _report(
    code: int, message: str, details: str, rank: int | None = None, kind: str = ""
) -> dict[str, Any]:
    """An outcome in the form that torchrun's agent reads, with our own fields beside it: `rank` is whose failure."""
    extra = {"py_callstack": details, "timestamp": str(int(time.time()))}
    return {
        "message": {"message": message, "extraInfo": extra},
        "exit_code": code,
        "rank": rank,
        "kind": kind,
        "time": time.time(),
    }


def reports_in(folder: Path) -> Reports:
    """What the ranks of an agent with the log folder `folder` told, by rank."""
    return {
        int(path.parent.name): json.loads(path.read_text())
        for path in folder.glob("*/attempt_0/*/error.json")
    }


def failure(
    reports: Reports, num_ranks: int, codes: Mapping[int, int] | None = None
) -> SyncbnError:
    """Why `num_ranks` ranks, some of which failed, did: see `outcomes`.

    Args:
        reports: what ranks told.
        num_ranks: of the group.
        codes: exit codes of ranks by rank, as far as they are known; a signal is its negative number.
    """
    failed = [report for report in reports.values() if report["exit_code"]]
    failed.sort(key=lambda report: (kind(report["exit_code"]), report["time"]))
    dead = [rank for rank in range(num_ranks) if rank not in reports]
    if dead and not (failed and kind(failed[0]["exit_code"]) < LOST):
        return InfrastructureError(f"{_died(dead, codes or {})}: {START_AGAIN}")
    if not failed:
        return InfrastructureError(f"a rank died at its end: {START_AGAIN}")
    told = failed[0]["message"]
    details, rank = told["extraInfo"]["py_callstack"], failed[0].get("rank")
    alike = len({report["message"]["message"] for report in failed}) == 1
    same = alike and len({report.get("rank") for report in failed}) > 1  # each failed by itself
    return RankFailed(
        told["message"],
        failed[0]["exit_code"],
        details,
        None if same else rank,
        failed[0].get("kind", ""),
    )


def _died(ranks: Sequence[int], codes: Mapping[int, int]) -> str:
    """That `ranks` died, with the signals that killed them, where those are known."""
    killed = sorted({signal.Signals(-codes[r]).name for r in ranks if codes.get(r, 0) < 0})
    how = f" (killed by {', '.join(killed)})" if killed else ""
    return f"rank {', '.join(map(str, ranks))} died{how}"


def after_signal(signal_number: int, reports: Reports, num_ranks: int) -> SyncbnError:
    """How ranks ended that a signal was handed on to: stopped, unless one says that something else went wrong.

    Rank 0 writes checkpoints, so it is the one to say whether there is one.
    """
    codes = {rank: report["exit_code"] for rank, report in reports.items()}
    if any(code and kind(code) < LOST for code in codes.values()):
        return failure(reports, num_ranks)
    said = reports[0]["message"]["message"] if 0 in reports else ""
    return Stopped(signal_number, saved=codes.get(0) == 0 or said == str(Stopped(signal_number)))
