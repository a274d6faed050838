"""The watchdog: why a rank that others wait for does not come, and whether it still can.

Each process that has a synchronised layer runs one daemon thread, which wakes once a second. While this rank waits in
an exchange, its watchdog asks the others', through the key-value store of torch.distributed, what their ranks are
doing. A watchdog that is asked looks at the Python stack and the processor time of the thread that runs the
model, and posts what it saw. So eval mode, prompts, uploads and long steps cost and mean nothing; the rules, for
each rank that has not come:

* It exited: `RankLost` at once, where ranks share a machine. Elsewhere a connection tells.
* It has let go of its process group: `RanksDisagree` at once, where ranks share memory.
* It is blocked in another collective (a reduction of gradients, a barrier, a layer of another group) that cannot end
  before this exchange has: `RanksDisagree`, once it has been seen there `QUIET_TICKS` times, about 5 s.
* Anything else, a rank that is stopped or held by a debugger included: it is waited for until the group's time
  limit, with one warning after 10 s that says what it was last seen doing, as does the error in the end: `RankLost`
  where it is stopped, or has fallen silent on another machine; else `RanksDisagree`.

A rank is blocked in a collective where its thread stands at one place inside torch.distributed, or inside autograd,
sleeps, and uses no processor time. Whether the collective can end is worked out from all ranks that take part
(`held_up`): a rank may wait for a slow third one, which is no disagreement.
"""

import atexit
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroup

from syncbn.norm.comm.fingerprint import RULE, RankLost, RanksDisagree, text_of
from syncbn.norm.comm.groups import Members, in_parents_group
from syncbn.norm.comm.processes import Activity, Collective, Process, Thread, activity

TICK_S = 1.0
"""How often the thread wakes."""
ASK_S = 0.9
"""How long a rank has waited when its watchdog begins to ask."""
ANSWERED_S = 5.0
"""How long an answer of a watchdog counts as a sign of life."""
QUIET_TICKS = 3
"""How often in a row a thread is seen blocked at one place before anything follows from it."""
STOPPED = ("T", "t")
"""States of a process, as Linux gives them, that does nothing until somebody lets it: by a signal, or a debugger."""
QUIET_S = 0.01
"""Processor time within a tick up to which a thread counts as blocked."""
SLOW_S = 10.0
"""After how long a rank that does not come is mentioned in the log."""
READS_A_TICK = 64
"""Ranks whose posts are read in one tick on average; of larger groups less often."""
_ASKED, _POST = "syncbn/asked", "syncbn/post/{}"

log = logging.getLogger(__name__)


class Post(NamedTuple):
    """What a rank's watchdog says of it.

    Attributes:
        tick: counts its posts.
        episode: counts the places at which the rank was.
        quiet: how often in a row the rank was seen blocked at this place.
        text: what it is doing, in words that follow "it".
        collective: that it is blocked in.
        process: of the rank.
        failures: of groups by name: whether a rank was lost, and the message.
    """

    tick: int
    episode: int
    quiet: int
    text: str
    collective: Collective | None
    process: Process
    failures: Mapping[str, tuple[bool, str]]

    @staticmethod
    def read(data: bytes) -> "Post":
        """The post that was written as JSON."""
        post = Post(*json.loads(data))
        collective = None if post.collective is None else Collective(*post.collective)
        return post._replace(collective=collective, process=Process(*post.process))


def held_up(blocked: Mapping[int, Collective]) -> set[int]:
    """Those of the `blocked` ranks that can never go on, because each waits for others of them.

    A rank in a symmetric collective waits for every rank that takes part and is not inside; in another one it may
    wait for some of them only. A rank that is not in `blocked` may come at any time.
    """
    held = set(blocked)
    while loose := {rank for rank in held if not _is_held(rank, blocked, held)}:
        held -= loose
    return held


def _is_held(rank: int, blocked: Mapping[int, Collective], held: set[int]) -> bool:
    own = blocked[rank]
    awaited = [
        other in held
        for other in own.ranks
        if other != rank and (other not in blocked or blocked[other].name != own.name)
    ]
    return any(awaited) if own.symmetric else bool(awaited) and all(awaited)


class Wait:
    """One exchange in which this rank waits longer than usual; a context manager.

    Args:
        group: whose ranks exchange, as its `turn` says.
    """

    def __init__(self, group: Members) -> None:
        self._group, self.own, self.here = group, group.ranks[group.rank], group.here()
        header, number = group.turn
        name = f"exchange {number} of group {group.name}"
        self.activity = Activity(
            f"{text_of(header, number)} with ranks {group.ranks}",
            Collective(name, group.ranks, True),
        )
        self.missing = [rank for rank in group.ranks if rank != self.own]
        """Global ranks that have not come; all others, where that is not known."""
        self.looks = 0
        """How often this rank has found itself still waiting."""
        self.verdict: RuntimeError | None = None
        self._began = time.monotonic()
        self._posts: dict[int, Post] = {}
        self._first: dict[int, Post] = {}
        """The first post of each rank's present episode that was read during this wait."""
        self._heard: dict[int, float] = {}
        self._warned = False

    def __enter__(self) -> Self:
        self._watched_by = watch()
        self._watched_by.waits.append(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._watched_by.waits.remove(self)
        if error is not None:
            give_up(self._group, error)

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def look(self, missing: Iterable[int] | None = None, left: Collection[int] = ()) -> None:
        """Raise when there is no hope that all ranks will come; to be called again and again.

        Args:
            missing: ranks in the group that have not come, where that is known.
            left: those of them that let go of the group.

        Raises:
            RankLost: one exited.
            RanksDisagree: by the rules above, or one did not come in time.
        """
        self.looks += 1
        if missing is not None:
            self.missing = [self._group.ranks[rank] for rank in missing]
        exited = [rank for rank in self.missing if self._state(rank) == "X"]
        exited = [rank for rank in self._late() if rank in exited] or exited
        if exited:  # one of several may have exited because another did
            ranks, who = " and rank ".join(map(str, exited)), "it" if len(exited) == 1 else "they"
            raise RankLost(f"{self.here} and waits for rank {ranks}: {who} exited")
        for rank in left:
            raise self._never(self._group.ranks[rank], "destroyed its process group")
        if self.verdict is not None:
            raise self.verdict
        if self.missing and self.waited_s > self._group.timeout_s:
            raise self.timed_out()
        if self.missing and self.waited_s > SLOW_S and not self._warned:
            self._warned = True
            seen = "; ".join(f"rank {rank}{self._seen(rank)}" for rank in self._late())
            log.warning("%s and has waited %.0f s for slow %s", self.here, self.waited_s, seen)

    def timed_out(self) -> RanksDisagree | RankLost:
        """The error of a rank that did not come within the group's time limit: lost, where it does nothing at all."""
        rank = self._late()[0]
        limit = f"did not come within {self._group.timeout_s:g} s"
        said = f"{self._waits_for(rank)} {limit}{self._seen(rank)}"
        return RankLost(said) if self._is_still(rank) else RanksDisagree(f"{said}; {RULE}")

    def lost(self, why: str) -> RuntimeError:
        """The error of a connection to some rank that broke, after a moment in which to find out which."""
        for _ in range(30):
            try:
                self.look()
            except RuntimeError as error:
                return error
            time.sleep(0.1)
        silent = [rank for rank in self.missing if not self.answers(rank)] or self._late()
        ranks = " or ".join(str(rank) for rank in silent)
        return RankLost(
            f"{self.here} and waits for rank {ranks}: it exited, failed or left the group ({why})"
        )

    def answers(self, rank: int) -> bool:
        """Whether the watchdog of global `rank` has answered lately: its process lives."""
        return time.monotonic() - self._heard.get(rank, -1e9) < ANSWERED_S

    def study(self, read: Callable[[int], Post | None]) -> None:
        """Read the others' posts and settle whether they can come; called by the watchdog's thread."""
        posts: dict[int, Post] = {}
        # a rank that has come may have given up meanwhile
        small = len(self._group.ranks) <= READS_A_TICK
        unread = set(self._group.ranks if small else self.missing) - {self.own}
        seen = {self.own}
        while unread:
            found = {rank: post for rank in unread if (post := read(rank)) is not None}
            posts |= found
            seen |= unread
            unread = {r for p in found.values() if p.collective for r in p.collective.ranks} - seen
        for rank, post in posts.items():
            if rank in self._posts and self._posts[rank].tick != post.tick:
                self._heard[rank] = time.monotonic()
            if rank not in self._first or self._first[rank].episode != post.episode:
                self._first[rank] = post
        self._posts = posts
        self.verdict = self.verdict or self._judged()

    def _judged(self) -> RuntimeError | None:
        """The error that the posts prove, if any."""
        for post in self._posts.values():
            if self._group.name in post.failures:
                lost, message = post.failures[self._group.name]
                return RankLost(message) if lost else RanksDisagree(message)
        blocked = {
            rank: post.collective for rank, post in self._posts.items() if self._is_blocked(rank)
        }
        assert self.activity.collective is not None
        blocked[self.own] = self.activity.collective
        held = held_up({rank: one for rank, one in blocked.items() if one is not None})
        for rank in self._late():
            if rank in held:
                return self._never(rank, self._posts[rank].text)
        return None

    def _is_blocked(self, rank: int) -> bool:
        """Whether `rank` was seen blocked at one place, at least once after this rank had begun to wait."""
        post = self._posts[rank]
        since = post.quiet - self._first[rank].quiet
        return post.collective is not None and post.quiet >= QUIET_TICKS and since > 0

    def _late(self) -> list[int]:
        """The missing ranks that are not known to wait in this very exchange; all of them, where all are."""
        here = self.activity.collective
        others = [
            rank
            for rank in self.missing
            if rank not in self._posts or self._posts[rank].collective != here
        ]
        return others or self.missing

    def _state(self, rank: int) -> str:
        """The state of the process of a missing rank."""
        index = self._group.ranks.index(rank)
        if self._group.processes:
            return self._group.processes[index].state()
        return self._posts[rank].process.state() if rank in self._posts else ""

    def _seen(self, rank: int) -> str:
        if self._state(rank) in STOPPED:
            return " (it is stopped)"
        return f" (it {self._posts[rank].text})" if rank in self._posts else ""

    def _is_still(self, rank: int) -> bool:
        """Whether the process of `rank` is stopped, or on another machine and silent where it used to answer."""
        state = self._state(rank)
        return state in STOPPED or (not state and rank in self._posts and not self.answers(rank))

    def _waits_for(self, rank: int) -> str:
        return f"{self.here} and waits for rank {rank}: it"

    def _never(self, rank: int, why: str) -> RanksDisagree:
        return RanksDisagree(f"{self._waits_for(rank)} {why} and cannot come; {RULE}")


class _Watchdog:
    """The thread of this process, and what it has seen."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        """Exchanges in which this rank waits."""
        self._thread: threading.Thread | None = None
        self._model: Thread | None = None
        """The thread that runs the model."""
        self._wake, self._ends = threading.Event(), False
        self._world: weakref.ref[ProcessGroup] | None = None
        self._looks_at: weakref.ref[ProcessGroup] | None = None
        """The default group whose store the thread uses just now."""
        self._store: Store | None = None
        self._rank = self._tick = self._asked = 0
        self._place: object = None
        self._used_s = 0.0
        self._episode = self._quiet = self._looks = self._runs = 0
        self._activity: Activity | None = None
        self._failures: dict[str, tuple[bool, str]] = {}
        self._failed_in: weakref.ref[ProcessGroup] | None = None
        """The default group that they belong to: groups of a later one may have the same names."""
        self._unposted = self._has_failed = False

    def start(self, runs: bool = True) -> None:
        """Watch the calling thread, in a thread of its own; unless it `runs` layers, only where no other is watched."""
        if runs or self._model is None or self._model.frame() is None:
            self._model = Thread()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="syncbn-watchdog", daemon=True)
            self._thread.start()

    def retire(self) -> None:
        """Have the thread end after its present look."""
        self._ends = True
        self._wake.set()

    def stop(self) -> None:
        """End the thread, which must not run while the interpreter is taken down."""
        self.retire()
        if self._thread is not None:
            self._thread.join(2 * TICK_S)  # it may wait for a store that does not answer

    @property
    def is_stuck(self) -> bool:
        """Whether the thread still uses the store of a default group that is gone: it may wait for minutes."""
        return self._looks_at is not None and self._looks_at() is not _world_group()

    def tell(self, group: str, lost: bool, message: str) -> None:
        """Let the ranks of `group` know why this one gave up there."""
        self._forget_other_failures(_world_group())
        self._failures[group] = lost, message
        self._unposted = True
        self._wake.set()

    def _run(self) -> None:
        while not self._ends:
            self._wake.wait(TICK_S)
            self._wake.clear()
            try:
                self.look()
            except Exception:  # training goes on
                if not self._has_failed:  # it may fail again every second
                    log.debug("the watchdog could not look", exc_info=True)
                self._has_failed = True
            self._looks_at = None

    def look(self) -> None:
        """One look: at this rank, and where it waits or was asked, to and from the others."""
        store = self._reach()
        if store is None:
            return
        asks = any(wait.waited_s > ASK_S for wait in self.waits)
        asked = store.add(_ASKED, int(asks))
        wanted, self._asked = asked != self._asked or self._unposted, asked
        self._observe(wanted)
        if wanted:
            self._unposted = False
            store.set(_POST.format(self._rank), json.dumps(self._post()))
        self._tick += 1
        for wait in self.waits.copy():
            if wait.waited_s > ASK_S and self._tick % (1 + len(wait.missing) // READS_A_TICK) == 0:
                wait.study(partial(_read, store))

    def _reach(self) -> Store | None:
        """The store by which to reach the other ranks; None while there are none."""
        world = _world_group()
        if world is None or world.size() == 1 or in_parents_group():
            self._world = self._store = None
            return None
        if self._world is None or self._world() is not world:
            self._world, self._store, self._rank = weakref.ref(world), None, world.rank()
            self._asked = -1
            self._forget_other_failures(world)
        self._looks_at = self._world
        return self._store or self._reached()

    def _forget_other_failures(self, world: ProcessGroup | None) -> None:
        """Keep the failures of `world` alone."""
        if self._failed_in is None or self._failed_in() is not world:
            self._failures = {}
            self._failed_in = None if world is None else weakref.ref(world)

    def _reached(self) -> Store:
        """The default group's store: over TCP a clone, because the model's thread may wait inside it.

        Others are not kept: one of files waits for its folder when it is let go of.
        """
        store = whole = dist.distributed_c10d._get_default_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if isinstance(store, TCPStore):
            whole = self._store = whole.clone()
        return whole

    def _observe(self, wanted: bool) -> None:
        """Look at the thread that runs the model, closely where an answer is `wanted`."""
        assert self._model is not None
        wait = next(reversed(self.waits.copy()), None)
        frame = self._model.frame() if wait is None else None
        if wait is not None:
            blocked, self._looks = self._looks != wait.looks, wait.looks
            self._note(wait, blocked)
            self._activity = wait.activity
        elif frame is None:  # the thread has ended
            self._note(None, False)
        else:
            self._note((id(frame), frame.f_lasti, self._num_runs()), self._model.sleeps())
            if wanted and (self._activity is None or self._quiet == QUIET_TICKS):
                self._activity = activity(frame)

    def _note(self, place: object, blocked: bool) -> None:
        """Note where the thread that runs the model is, and whether it is blocked there if it was there before."""
        if place != self._place:
            self._place, self._quiet, self._activity = place, 0, None
            self._episode += 1
        elif blocked:
            self._quiet += 1

    def _num_runs(self) -> int:
        """In how many ticks the thread has used processor time: where it is again, it may be anew."""
        assert self._model is not None
        used_s, before_s = self._model.used_s(), self._used_s
        self._used_s = used_s
        self._runs += used_s - before_s > QUIET_S
        return self._runs

    def _post(self) -> Post:
        seen = self._activity or Activity("runs")
        return Post(self._tick, self._episode, self._quiet, *seen, Process.own(), self._failures)


def _read(store: Store, rank: int) -> Post | None:
    """What the watchdog of global `rank` has posted last."""
    key = _POST.format(rank)
    return Post.read(store.get(key)) if store.check([key]) else None


def _world_group() -> ProcessGroup | None:
    return dist.group.WORLD if dist.is_available() else None


_watchdog = _Watchdog()
atexit.register(lambda: _watchdog.stop())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _watchdog.__init__())  # no thread, and no wait


def give_up(group: Members, error: BaseException) -> str:
    """Let the other ranks of `group` know of the `error` that ends its exchange here; the message that they raise."""
    here = group.here()
    known = isinstance(error, RanksDisagree | RankLost) or here in str(error)
    message = str(error) if known else f"{here}, and was interrupted: {error!r}"
    _watchdog.tell(group.name, not isinstance(error, RanksDisagree), message)
    return message


def watch(runs: bool = True) -> _Watchdog:
    """Have this process's watchdog answer for the calling thread, which runs layers, or builds or copies one."""
    global _watchdog
    if _watchdog.is_stuck:
        _watchdog.retire()
        _watchdog = _Watchdog()
    _watchdog.start(runs)
    return _watchdog
