"""What a rank that fails tells the process that started it, through the file torchrun's agent gives each rank."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from syncbn.errors import InfrastructureError, RankFailed, SyncbnError, exit_code


@contextmanager
def told() -> Iterator[None]:
    """Leave a failure within behind for `first_failure`, and end the process with its exit code."""
    try:
        yield
    except BaseException as error:
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file is not None:
            Path(file).write_text(json.dumps(_report(error)))
        raise SystemExit(exit_code(error)) from None


def _report(error: BaseException) -> dict[str, Any]:
    """The failure in the form that torchrun's agent reads, with our own fields beside it."""
    ours = hasattr(error, "exit_code")
    text = str(error) if ours else f"{type(error).__name__}: {error}"
    extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(time.time()))}
    return {
        "message": {"message": text, "extraInfo": extra},
        "exit_code": exit_code(error),
        "time": time.time(),
    }


def first_failure(error: ChildFailedError) -> SyncbnError:
    """The failure behind `error`: the first rank's that names a cause, else the death of a rank.

    When a rank fails, its peers lose their connection to it and fail too, without knowing why; so an error with an
    exit code of its own is heard before the others.
    """
    reports = [_read(failure) for failure in error.failures.values()]
    reports = sorted((r for r in reports if r), key=lambda r: (r["exit_code"] == 1, r["time"]))
    if reports:
        told = reports[0]["message"]
        return RankFailed(
            told["message"], reports[0]["exit_code"], told["extraInfo"]["py_callstack"]
        )
    rank, failure = error.get_first_failure()
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return InfrastructureError(
        f"rank {rank} died of {how}: start it again to continue from its checkpoint"
    )


def _read(failure: ProcessFailure) -> dict[str, Any] | None:
    try:
        report = json.loads(Path(failure.error_file).read_text())
    except (OSError, ValueError):
        return None
    return report if "exit_code" in report else None
