"""What the process that starts a study does around its trials, whichever launcher runs them."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from syncbn.checkpoint import RunLock
from syncbn.compare.queue import trials
from syncbn.compare.report import print_table
from syncbn.compare.results import write_results
from syncbn.config import Config


def conduct(cfg: Config, run: Callable[[], object]) -> dict[str, Any]:
    """Let `run` take the trials of the study in `cfg`, then write its results, print them, and return the summary.

    Raises:
        SyncbnError: a trial failed, or the results cannot be compared; finished trials are kept.
    """
    began = time.time()
    todo = trials(cfg)
    with RunLock(cfg.folder):
        run()
        ran = time.time()
        summary = write_results(cfg)
        wrote = time.time()
    print_table(summary, Console(), cfg.folder)
    return summary
