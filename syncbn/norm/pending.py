"""What has been begun with other ranks, and is looked at later."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """A result that is on its way.

    Args:
        finish: waits for it; called once.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._outcome: T | BaseException | None = None

    def result(self) -> T:
        """The result, waited for; the same, or the same error, whenever it is asked for again."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            try:
                self._outcome = finish()
            except BaseException as error:
                self._outcome = error
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome  # pyright: ignore[reportReturnType]

    def then(self, change: "Callable[[T], U]") -> "Pending[U]":
        """What `change` makes of the result, once that is there."""
        return Pending(lambda: change(self.result()))
