"""Outcomes of several ranks: which of them is reported, so that a user learns the cause.

When a rank fails, the others lose their connection to it or are stopped, and fail too without knowing why. So a rank
that names a cause comes before one with a bug of ours, and both before ranks that disagree, failed or were stopped
because of another.
"""

from syncbn.errors import InfrastructureError, exit_code
from syncbn.norm import RanksDisagree

NAMED, BUG, DISAGREE, LOST, STOPPED = range(5)
"""What an exit code says of its rank, in the order in which ranks are reported."""

_KINDS = {
    1: BUG,
    RanksDisagree.exit_code: DISAGREE,
    InfrastructureError.exit_code: LOST,
    130: STOPPED,
    143: STOPPED,
}


def kind(code: int) -> int:
    """`NAMED`, `BUG`, `DISAGREE`, `LOST` or `STOPPED`, for the exit code of a rank that did not succeed."""
    return _KINDS.get(code, NAMED)


def was_stopped(error: BaseException) -> bool:
    """Whether `error` is how a signal ended what ran, here or on a rank."""
    return isinstance(error, KeyboardInterrupt) or kind(exit_code(error)) == STOPPED
