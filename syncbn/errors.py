"""Errors that a user can cause or see, each with its exit code.

Every such failure has one class here and one exit code; a program's `main` turns the exception into one line on stderr
and that code. The layer's own errors carry theirs too (5: ranks disagree, 8: non-finite statistics), so that nothing
here imports torch. Anything else that escapes is our bug: exit 1.
"""

import errno
import traceback
from pathlib import Path


class SyncbnError(Exception):
    """A failure with a message for the person who reads it: what was wrong, the value, what is allowed."""

    exit_code = 1


class UsageError(SyncbnError):
    """A command, a config key or a value that cannot be used."""

    exit_code = 2


class DataError(SyncbnError):
    """A data set that is missing, damaged, too small, or not what its config says."""

    exit_code = 3


class CheckpointError(SyncbnError):
    """A checkpoint that cannot be read, verified, written or matched to this run."""

    exit_code = 4


class ServiceUnreachable(SyncbnError):
    """A Ray cluster or an MLflow server that does not answer."""

    exit_code = 6


class NotAuthorised(SyncbnError):
    """A service that refuses this user, or one that accepts anyone."""

    exit_code = 7


class NonFinite(SyncbnError):
    """A loss or a statistic that is NaN or infinite on some rank.

    Args:
        message: where it was found.
        steps: optimiser steps done by then.
    """

    exit_code = 8

    def __init__(self, message: str, steps: int = 0) -> None:
        super().__init__(message, steps)  # both, so that it can travel pickled
        self.steps = steps

    def __str__(self) -> str:
        return str(self.args[0])


class GotWorse(SyncbnError):
    """A study that came out worse than an earlier launch of it: what `syncbn compare-to` looks for."""

    exit_code = 9


class StudyFailed(SyncbnError):
    """Studies of a tier, or trials of a sweep, some of which failed; what the others came to is written.

    Args:
        message: which, and how.
        exit_code: that of the worst failure.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


START_AGAIN = "start it again to continue from its checkpoint"
"""What to do about an `InfrastructureError`, which a launcher does by itself a few times."""


class InfrastructureError(SyncbnError):
    """A worker, node or service that died under a run: the same command may succeed when tried again."""

    exit_code = 75


class Interrupted(SyncbnError):
    """A run that ended at a step boundary before it was done; its checkpoint was saved, to go on from."""


class OutOfTime(Interrupted):
    """An attempt took longer than `train.time_limit_s`."""

    exit_code = 75


class Stopped(Interrupted):
    """A signal ended the run, at a step boundary if it could.

    Args:
        signal_number: the signal received, 2 (SIGINT) or 15 (SIGTERM).
        saved: whether a checkpoint was saved for it.
    """

    def __init__(self, signal_number: int, saved: bool = True) -> None:
        how = ", checkpoint saved" if saved else " before a checkpoint could be saved"
        super().__init__(f"stopped by signal {signal_number}{how}")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class RankFailed(SyncbnError):
    """What made a rank fail, as reported to the process that started it and to the other ranks.

    Args:
        message: what went wrong, in one line.
        exit_code: the rank's own exit code.
        details: the rank's traceback, where the failure is a bug.
        rank: which, where it is not the same on all.
        kind: the name of the error's class, where `message` lacks it.
    """

    def __init__(
        self,
        message: str,
        exit_code: int,
        details: str = "",
        rank: int | None = None,
        kind: str = "",
    ) -> None:
        super().__init__(message, exit_code, details, rank, kind)  # so that it can travel pickled
        self.exit_code, self.details, self.rank, self.kind = exit_code, details, rank, kind

    def __str__(self) -> str:
        return str(self.args[0])


def exit_code(error: BaseException) -> int:
    """The exit code that `error` carries; 75 where a disk, a quota or /dev/shm is full; else 1: our bug."""
    if _is_full(error):
        return getattr(error, "exit_code", InfrastructureError.exit_code)
    return getattr(error, "exit_code", 1)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_rank(error: BaseException) -> int | None:
    """The rank whose failure `error` is; None where it is not known, or not of one rank alone."""
    return getattr(error, "rank", None)


def class_of(error: BaseException) -> str:
    """The name of the class of `error`, also where it comes from another rank."""
    return getattr(error, "kind", "") or type(error).__name__


def in_words(error: BaseException) -> str:
    """The message of `error`; of a bug of ours with its class, and the last line of ours that it came through."""
    if hasattr(error, "exit_code"):
        return str(error) or type(error).__name__
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [one for one in frames if one[0].f_globals.get("__name__", "").startswith("syncbn.")]
    at = [f"at {Path(f.f_code.co_filename).name}:{n}" for f, n in (ours or frames)[-1:]]
    full = ["(a disk, or /dev/shm: see `df`)"] if _is_full(error) and not _names_file(error) else []
    return " ".join([f"{type(error).__name__}:", str(error), *full, *at])


def _names_file(error: BaseException) -> bool:
    return getattr(error, "filename", None) is not None


def with_class(error: BaseException) -> str:
    """The message of `error` with the name of its class and, where it is another rank's, with that."""
    kind = class_of(error)
    where = f" (rank {of_rank(error)})" if isinstance(error, RankFailed) else ""
    text = in_words(error)
    return (text if text.startswith(f"{kind}:") else f"{kind}: {text}") + where
