"""The writer thread: takes journals to a tracking service while training goes on.

Training and this thread share nothing but the journal files. The thread connects (which for MLflow means seconds of
importing), follows, retries for as long as it takes, and is a daemon, so that neither a dead nor a hanging service can
slow a step, fail a run or keep a process from ending.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from syncbn.tracking.redact import redact_text
from syncbn.tracking.source import RunSource, Sink

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
CLOSE_S = 30.0
"""Longest wait at the end of a run: importing mlflow and making a store takes 6 s, 13 s on a busy machine."""
CLOSE_FAILING_S = 10.0
"""The same for a service that has failed meanwhile."""

log = logging.getLogger("syncbn.tracking")


class Shipping(Protocol):
    """Something that takes a run's journal elsewhere until it is closed."""

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Send the rest, for at most `timeout_s` seconds, and return how many records remain unsent."""
        ...

    def drop(self) -> None:
        """Close without sending what nobody would look at, unless the service was reached already."""
        ...


class NoShipper:
    """The shipping of a run whose journal is all there is."""

    def close(self, timeout_s: float = CLOSE_S) -> int:  # noqa: ARG002 - the protocol's signature
        """Nothing is unsent."""
        return 0

    def drop(self) -> None:
        """Nothing would be sent."""


class Shipper:
    """Pumps sources into the sink that `connect` gives, in a daemon thread.

    Args:
        connect: returns the sink; called in the thread, again after each failure of its own.
        target: the service in words, for messages.
        sources: what to send, parents before their children; `add` takes more.
        poll_s: seconds between looks at the journals, and before the first.
    """

    def __init__(
        self,
        connect: Callable[[], Sink],
        target: str,
        sources: list[RunSource],
        poll_s: float = 1.0,
    ) -> None:
        self._connect = connect
        self._target = redact_text(target)
        self._sources = list(sources)
        self._poll_s = poll_s
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._sink: Sink | None = None
        self._delay_s = FIRST_DELAY_S
        self.failure: str | None = None
        """What the service last failed of; None where it works."""
        self._thread = threading.Thread(target=self._run, name="syncbn-shipper", daemon=True)
        self._thread.start()

    def add(self, source: RunSource) -> None:
        """Follow `source` too."""
        self._sources.append(source)

    def close(self, timeout_s: float = CLOSE_S) -> int:
        """Send the rest, waiting at most `timeout_s` seconds; one warning says what then is unsent.

        A service that fails is tried again for no more than `CLOSE_FAILING_S` of them.

        Returns:
            How many journal records the service does not have yet.
        """
        self._deadline = time.monotonic() + min(timeout_s, CLOSE_FAILING_S)
        self._delay_s = FIRST_DELAY_S
        self._closing.set()
        self._thread.join(timeout_s)
        if all(source.complete for source in self._sources):
            return 0
        unsent = self.num_unsent()
        what = f"{unsent} records are" if unsent else "files of the run's end are"
        log.warning(
            "MLflow at %s: %s so far %s alone (%s); send them later with `syncbn ship %s`",
            self._target, what, "in the journal" if unsent else "in its folder",
            self.failure or "no answer yet", self._sources[0].folder,
        )  # fmt: skip
        return unsent

    def drop(self) -> None:
        """Do not wait for the service, and send nothing; `close` where it was reached already."""
        if self._sink is not None:
            self.close()
            return
        self._sources.clear()
        self._closing.set()

    def num_unsent(self) -> int:
        """Journal records that the service does not have yet."""
        return sum(source.num_unsent() for source in self._sources)

    def _run(self) -> None:
        self._closing.wait(self._poll_s)  # importing MLflow would hold up what begins just now
        while True:
            closing = self._closing.is_set()
            if self._pump(closing):
                if closing:
                    return
                self._closing.wait(self._poll_s)
            elif not self._wait_after_failure():
                return

    def _pump(self, final: bool) -> bool:
        """Whether all that is there was sent."""
        try:
            self._sink = self._sink or self._connect()
            for source in list(self._sources):
                if not source.complete:
                    source.pump(self._sink, final)
        except Exception as error:
            if self.failure is None and not final:
                log.warning(
                    "MLflow at %s does not take records (%s): training goes on, they wait in the journal",
                    self._target, one_line(error),
                )  # fmt: skip
            self.failure = one_line(error)
            return False
        if self.failure is not None:
            log.warning("MLflow at %s takes records again", self._target)
        self.failure, self._delay_s = None, FIRST_DELAY_S
        return True

    def _wait_after_failure(self) -> bool:
        """Sleep for the back-off, or to the deadline for failures; whether there is time to try again."""
        delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
        if not self._closing.is_set():
            self._closing.wait(delay)
            return True
        left = self._deadline - time.monotonic()
        time.sleep(max(0.0, min(delay, left)))
        return left > delay


def one_line(error: BaseException) -> str:
    """Class and first 200 characters of `error`, on one line and without secrets."""
    text = " ".join(redact_text(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
