"""Progress of ranks that have no terminal, read from their files and printed by the driver.

Ray would forward every line that any of its processes writes; the run's own journal has less and says more.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from syncbn.compare.study.design import SEARCH, TRIALS, num_trials
from syncbn.config import Config
from syncbn.launch.periodic import periodically
from syncbn.tracking.journal import read_journal

EVERY_S = 5.0


@contextmanager
def progress_of(cfg: Config) -> Iterator[None]:
    """Say every few seconds on stderr how far the run or study in `cfg` is, where `train.progress` wants it."""
    said = ""

    def tell() -> None:
        nonlocal said
        line = study_progress(cfg) if cfg.study else run_progress(cfg)
        if line not in ("", said):
            said = line
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    with periodically(tell, EVERY_S) if cfg.train.progress else nullcontext():
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
