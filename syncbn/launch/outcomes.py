"""Outcomes of several ranks: which of them is reported, so that a user learns the cause.

When a rank fails, the others lose their connection to it or are stopped, and fail too without knowing why. So a rank
that names a cause comes before one with a bug of ours, and both before ranks that failed or were stopped because of
another.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.errors import InfrastructureError, exit_code

NAMED, BUG, LOST, STOPPED = range(4)
"""What an exit code says of its rank, in the order in which ranks are reported."""

_SIGNS = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says when a rank exited."""


def kind(code: int) -> int:
    """`NAMED`, `BUG`, `LOST` or `STOPPED`, for the exit code of a rank that did not succeed."""
    return {1: BUG, InfrastructureError.exit_code: LOST, 130: STOPPED, 143: STOPPED}.get(
        code, NAMED
    )


def was_stopped(error: BaseException) -> bool:
    """Whether `error` is how a signal ended what ran, here or on a rank."""
    return isinstance(error, KeyboardInterrupt) or kind(exit_code(error)) == STOPPED


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Tell a connection that another rank closed from a bug of this rank.

    Raises:
        InfrastructureError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if hasattr(error, "exit_code") or not any(sign in str(error) for sign in _SIGNS):
            raise
        raise InfrastructureError(
            "another rank exited: where it left no message of its own, start it again to continue from its checkpoint"
        ) from error
