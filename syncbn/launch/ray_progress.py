"""Progress of ranks that have no terminal, read from their files and printed by the driver.

Ray would forward every line that any of its processes writes; the run's own journal has less and says more.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from syncbn.compare.study.design import SEARCH, TRIALS, num_trials
from syncbn.compare.study.failure import failure_in
from syncbn.compare.sweep.design import Sweep
from syncbn.config import Config
from syncbn.launch.periodic import periodically
from syncbn.tracking.journal import read_journal

EVERY_S = 5.0


@contextmanager
def told(progress: Callable[[], str], wanted: bool) -> Iterator[None]:
    """Say every few seconds on stderr what `progress` gives, where it is new and `wanted` (`train.progress`)."""
    said = ""

    def tell() -> None:
        nonlocal said
        line = progress()
        if line not in ("", said):
            said = line
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    with periodically(tell, EVERY_S) if wanted else nullcontext():
        yield


def run_progress(cfg: Config) -> str:
    """The run's last step and training loss, or nothing before the first."""
    path = cfg.folder / "journal.jsonl"
    records = read_journal(path) if path.is_file() else ()
    losses = [r for r in records if "train_loss" in r.get("metrics", {})]
    if not losses:
        return ""
    step, loss = losses[-1]["step"], losses[-1]["metrics"]["train_loss"]
    return f"{cfg.name}: step {step}/{cfg.train.steps}, train_loss {float(loss):.4g}"


def study_progress(cfg: Config) -> str:
    """How many of the study's trials are done."""
    assert cfg.study is not None
    done = sum(len(list(cfg.folder.glob(f"{f}/*/summary.json"))) for f in (SEARCH, TRIALS))
    return f"{cfg.name}: {done} of {num_trials(cfg.study)} trials done"


def sweep_progress(sweep: Sweep) -> str:
    """How many of the sweep's trials are done, and how many of those failed."""
    folders = [trial.config.folder for trial in sweep.trials]
    done = sum((folder / "summary.json").is_file() for folder in folders)
    failed = sum(failure_in(folder) is not None for folder in folders)
    said = f"{sweep.config.name}: {done + failed} of {len(folders)} trials done"
    return f"{said}, {failed} failed" if failed else said
