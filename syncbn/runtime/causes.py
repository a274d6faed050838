"""The first failure among ranks, known to all of them.

When one rank fails, the others fail for want of it: a connection is closed, a collective never ends. What they would
say hides the cause. So a rank that fails by itself leaves its failure in the group's key-value store before it leaves
the group, and a rank that fails in consequence raises that one. It is then what the journal, the launcher and each
rank's process end with.
"""

import json
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from syncbn.errors import (
    START_AGAIN,
    InfrastructureError,
    Interrupted,
    RankFailed,
    exit_code,
    in_words,
)
from syncbn.norm import RankLost, RanksDisagree
from syncbn.runtime.base import Runtime

PATIENCE_S = 1.0
"""How long a rank that lost another waits for its word: a layer tells of an error before it is raised."""
_KEY = "syncbn/cause/{}"
_LOST = re.compile("connection (closed|reset) by peer|broken pipe|socket closed", re.IGNORECASE)
"""What gloo says when a rank exited."""
_LATE = re.compile(r"timed out waiting \d+ ?ms", re.IGNORECASE)
"""What it says when one did not come within `launcher.timeout_s`."""


class OtherRankExited(InfrastructureError):
    """A connection to another rank was closed, and none has said why."""


class OtherRankSilent(InfrastructureError):
    """Another rank did not come to a collective of the loop, and none has said why."""


_IN_CONSEQUENCE = (RanksDisagree, RankLost, OtherRankExited, OtherRankSilent)
"""Errors that may say no more than that another rank did not come."""


@contextmanager
def cause_told(runtime: Runtime, work: str = "") -> Iterator[None]:
    """Within, ranks that fail because one of them did raise what that one failed of; a collective.

    Args:
        runtime: of the ranks.
        work: a name, for the failures of one piece of work not to be taken for those of the next.

    Raises:
        RankFailed: in place of an error that follows from another rank's.
        InfrastructureError: in place of torch's error about a connection, where no rank told of a failure.
    """
    try:
        yield
    except BaseException as error:
        if runtime.world_size == 1 or isinstance(error, Interrupted | KeyboardInterrupt):
            raise
        cause = _cause_of(error, runtime, _KEY.format(work))
        if cause is not None:
            raise cause from error
        if getattr(error, "rank", None) is None:
            with suppress(AttributeError):
                error.rank = runtime.rank  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _cause_of(error: BaseException, runtime: Runtime, key: str) -> Exception | None:
    """What to raise in place of `error`; None where this rank failed by itself, which it then tells the others."""
    of_torch = not hasattr(error, "exit_code")
    is_lost = of_torch and _LOST.search(str(error)) is not None
    is_late = of_torch and _LATE.search(str(error)) is not None
    follows = is_lost or is_late or isinstance(error, _IN_CONSEQUENCE)
    if follows or _may_follow(error):
        text = _read(runtime, key, PATIENCE_S if follows else 0.0)
        told = None if text is None else json.loads(text)
        if told is not None and told["rank"] != runtime.rank:
            return RankFailed(**told)
    if is_lost:
        return OtherRankExited(
            "another rank exited: where it left no message of its own, start it again to continue from its checkpoint"
        )
    if is_late:
        return _silent(runtime, f"{key}/late")
    if not follows and not isinstance(error, RankFailed):
        runtime.post(key, json.dumps(_told(error, runtime.rank)))
    return None


def _silent(runtime: Runtime, key: str) -> OtherRankSilent:
    """Names the ranks that do not say under `key` that they wait as well."""
    runtime.post(f"{key}/{runtime.rank}", "waits")
    time.sleep(PATIENCE_S)
    others = [rank for rank in range(runtime.world_size) if rank != runtime.rank]
    silent = [rank for rank in others if runtime.posted(f"{key}/{rank}") is None]
    who = (
        f"rank {', '.join(map(str, silent))}" if silent else "every other rank waits too, and none"
    )
    return OtherRankSilent(
        f"{who} did not come within launcher.timeout_s: it is stopped or hangs, or its machine or link is gone: "
        f"{START_AGAIN}"
    )


def _may_follow(error: BaseException) -> bool:
    """Whether it is an error of torch's that a rank may get which is out of step with the others."""
    return isinstance(error, RuntimeError) and not hasattr(error, "exit_code")


def _told(error: BaseException, rank: int) -> dict[str, object]:
    return {
        "message": in_words(error),
        "exit_code": exit_code(error),
        "details": "".join(traceback.format_exception(error)),
        "rank": rank,
        "kind": type(error).__name__,
    }


def _read(runtime: Runtime, key: str, patience_s: float) -> str | None:
    limit = time.monotonic() + patience_s
    while (text := runtime.posted(key)) is None and time.monotonic() < limit:
        time.sleep(0.02)
    return text
