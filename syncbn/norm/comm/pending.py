"""What has been begun with other ranks, and is looked at later."""

from collections.abc import Callable
from typing import Generic, TypeVar

from syncbn.norm.comm.fingerprint import RanksDisagree

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """A result that is on its way.

    Args:
        finish: waits for it; called once.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._value: list[T] = []
        self._failure = ""

    def result(self) -> T:
        """The result, waited for; the same whenever it is asked for again.

        Raises:
            RanksDisagree: it was asked for before, and failed; the first time whatever the wait raises.
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            try:
                self._value.append(finish())
            except BaseException as error:
                # the error itself would keep all frames alive that it went through, this one and its values among them
                known = isinstance(error, RanksDisagree)
                self._failure = (
                    f"{'' if known else 'the exchange failed: '}{error or type(error).__name__}"
                )
                raise
        if self._failure:
            raise RanksDisagree(self._failure)
        return self._value[0]

    def then(self, change: "Callable[[T], U]") -> "Pending[U]":
        """What `change` makes of the result, once that is there."""
        return Pending(lambda: change(self.result()))
