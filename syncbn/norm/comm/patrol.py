"""When a rank that waits gives up, and what it says.

The rules, for each rank that has not come:

* It has ended, buried or not: `RankLost` at once.
* It has let go of its process group, and so can never come: `RanksDisagree` at once.
* It went through the awaited layer in eval mode, as this rank did not, and sleeps: `RanksDisagree` once it has slept
  for 4 s where it ran the backward pass too, for 6 s where the forward pass alone (it may be evaluating).
* It runs a backward pass in eval mode, of a layer whose forward pass others wait in: `RanksDisagree` at once, there
  too.
* It sleeps, and nothing tells why: `RanksDisagree` after 300 s, or at the group's time limit if that is shorter.
* It works: it is waited for until the group's time limit, with one warning after 10 s. So is one that was
  stopped, waits for a disk, or is held by a debugger that stops it.

Asleep is a process without processor time (see `processes`): one that sleeps longer than that for a reason, say for
an upload or at a prompt, needs a barrier around it, or `SYNCBN_EXCHANGE=gloo`, where only the time limit counts.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from syncbn.norm.comm.fingerprint import RankLost, RanksDisagree
from syncbn.norm.comm.processes import Process, Rest

ASLEEP_S = {"backward": 4.0, "forward": 6.0, "": 300.0}
"""How long a rank may sleep, by what it did in eval mode."""
LINGER_S = 1.0
"""How long the first backward pass in eval mode since the last exchange waits for ranks that may not be there yet."""
SLOW_S = 10.0
"""After which a rank that works is mentioned in the log."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Absent:
    """What is known of a rank that has not come.

    Attributes:
        rank: its global rank.
        process: None where it is unknown, or on another machine.
        passed: "forward" or "backward": the last that it did in eval mode with the awaited layer; "" otherwise.
        left: whether it let go of the group.
    """

    rank: int
    process: Process | None
    passed: str = ""
    left: bool = False


def linger(unknown: Callable[[], bool]) -> None:
    """Wait while it is `unknown` what other ranks do, for a moment.

    A rank that runs a backward pass in eval mode is about to block in the sum of gradients, if others train: it is
    told apart only here, and only if they come in time.
    """
    end = time.monotonic() + LINGER_S
    while unknown() and time.monotonic() < end:
        time.sleep(0.002)


class Patrol:
    """Looks after the ranks that one exchange waits for.

    Args:
        here: who waits where, in words.
        timeout_s: the group's time limit.
    """

    def __init__(self, here: str, timeout_s: float) -> None:
        self._here, self._timeout_s = here, timeout_s
        self._began = time.monotonic()
        self._rests: dict[int, Rest] = {}
        self._warned = False

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def look(self, absent: Sequence[Absent]) -> None:
        """Raise when there is no hope that all of `absent` will come.

        Raises:
            RankLost: one has ended.
            RanksDisagree: by the rules above, or none of them came in time.
        """
        if not absent:
            return
        for one in absent:
            self._judge(one)
        if self.waited_s > self._timeout_s:
            raise self._gone(
                absent[0], f"did not come within {self._timeout_s:g} s{_hint(absent[0])}"
            )
        if self.waited_s > SLOW_S and not self._warned:
            self._warned = True
            slow = ", ".join(str(one.rank) for one in absent)
            log.warning(
                "%s and has waited %.0f s for slow rank %s", self._here, self.waited_s, slow
            )

    def _judge(self, one: Absent) -> None:
        if one.process is not None and one.process.state() == "X":
            raise RankLost(f"{self._here} and waits for rank {one.rank}: it died")
        if one.left:
            raise self._gone(one, "destroyed its process group and cannot come")
        asleep_s = self._asleep_s(one)
        if asleep_s < ASLEEP_S[one.passed]:
            return
        passed = (
            f"went through the {one.passed} of this layer in eval mode and " if one.passed else ""
        )
        raise self._gone(one, f"{passed}has been blocked elsewhere for {asleep_s:.0f} s")

    def _asleep_s(self, one: Absent) -> float:
        if one.process is None:
            return 0.0
        if one.rank not in self._rests:
            self._rests[one.rank] = Rest(one.process)
        return self._rests[one.rank].asleep_s()

    def _gone(self, one: Absent, why: str) -> RanksDisagree:
        return RanksDisagree(
            f"{self._here} and waits for rank {one.rank}: it {why}; "
            "every rank must run the same layers in the same order and mode"
        )


def _hint(one: Absent) -> str:
    """What a rank that is late was last seen doing."""
    state = one.process.state() if one.process else ""
    return " (it is stopped)" if state in ("T", "t") else ""
