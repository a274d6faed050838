"""One run with its files: the journal while it lasts, `summary.json` at its end, nothing trained twice."""

import json
from pathlib import Path

import torch

from syncbn.config import RunConfig, config_hash
from syncbn.errors import Interrupted, UsageError, with_class
from syncbn.extensions import failures_named
from syncbn.runtime.base import Runtime
from syncbn.runtime.causes import cause_told
from syncbn.tracking import Journal, Tracker, Untracked
from syncbn.tracking.redact import redact_text
from syncbn.train.changed_config import changes_since
from syncbn.train.loop import train
from syncbn.train.summary import RunSummary


def recorded_run(cfg: RunConfig, runtime: Runtime) -> RunSummary:
    """Train `cfg` on the ranks of `runtime` and write its journal and summary; rank 0 writes.

    A run that has finished before is not trained again: its summary is returned.

    Raises:
        UsageError: the folder holds a finished run of another config.
        SyncbnError: see `train`; the journal then ends with how the run ended.
    """
    done = _done(cfg) if cfg.train.resume else None
    if _on_main(done is not None, runtime):
        assert done is not None
        return done
    if runtime.is_main:  # an interrupted attempt must not leave its predecessor's outcome behind
        (cfg.folder / "summary.json").unlink(missing_ok=True)
    tracker: Tracker = Journal(cfg.folder / "journal.jsonl") if runtime.is_main else Untracked()
    try:
        with cause_told(runtime, cfg.name), failures_named():
            summary = train(cfg, runtime, tracker)
    except BaseException as error:
        status = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        if not tracker.begun:
            raise  # this attempt has nothing to record, and an earlier one's journal stays as it is
        reason = redact_text(with_class(error))
        tracker.event("end", status=status, summary=None, error=reason)
        raise
    else:
        tracker.event("end", status="finished", summary=summary.to_dict(), error=None)
    finally:
        tracker.close()
    if runtime.is_main:
        write_summary(cfg.folder, summary)
    return summary


def finished(cfg: RunConfig) -> RunSummary | None:
    """The summary of the run in `cfg.folder`, where it has finished.

    Raises:
        UsageError: it finished with another config; names what differs.
    """
    summary = _summary(cfg.folder)
    if summary is not None and summary.config_hash != config_hash(cfg):
        raise _of_another(cfg, summary)
    return summary


def _done(cfg: RunConfig) -> RunSummary | None:
    """`finished`, with what may change in a run; None where it is given more steps, so that it goes on."""
    summary = _summary(cfg.folder)
    if summary is None or summary.config_hash == config_hash(cfg):
        return summary
    changes = changes_since(cfg, summary.config_hash)
    if changes is None or not changes.allowed_from(summary.steps):
        raise _of_another(cfg, summary)
    return None if changes.give_more_steps else summary


def _summary(folder: Path) -> RunSummary | None:
    try:
        return RunSummary.from_dict(json.loads((folder / "summary.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # none, half a file from before a crash, or another program's: train again


def _of_another(cfg: RunConfig, summary: RunSummary) -> UsageError:
    changes = changes_since(cfg, summary.config_hash)
    hashes = f"of config {summary.config_hash}, this one is {config_hash(cfg)}"
    how = hashes if changes is None else f"with other settings: {changes}"
    return UsageError(
        f"{cfg.folder} holds a finished run {how}: give it another name, or train.resume=false to replace it"
    )


def write_summary(folder: Path, summary: RunSummary) -> None:
    """Write `summary.json` whole or not at all."""
    beside = folder / ".summary.json"
    beside.write_text(json.dumps(summary.to_dict(), indent=2, allow_nan=False) + "\n")
    beside.replace(folder / "summary.json")


def _on_main(flag: bool, runtime: Runtime) -> bool:
    """Rank 0's `flag`, on every rank."""
    value = torch.tensor(float(flag), dtype=torch.float64, device=runtime.device)
    return bool(runtime.from_main(value))
