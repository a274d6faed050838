"""Faults, and seeded plans of them."""

import os
import random
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil


class Fault(NamedTuple):
    """What happens, to which rank, once it has taken `step`."""

    kind: str
    step: int
    rank: int


def plan(
    seed: int, kinds: Sequence[str], num_faults: int, steps: int, num_ranks: int
) -> list[Fault]:
    """`num_faults` faults in the order of their steps, drawn from `kinds`; the same seed gives the same plan."""
    chance = random.Random(seed)
    when = sorted(chance.sample(range(1, steps - 1), num_faults))
    return [Fault(chance.choice(kinds), step, chance.randrange(num_ranks)) for step in when]


class Target(NamedTuple):
    """The processes that a fault can happen to."""

    rank: int
    """Process id of the fault's rank."""
    launcher: int
    """That of the command."""


def kill_rank(target: Target) -> None:
    """SIGKILL, as the kernel does to a process when memory is short."""
    os.kill(target.rank, signal.SIGKILL)


def stop_rank(target: Target) -> None:
    """SIGSTOP: it is there and does nothing."""
    os.kill(target.rank, signal.SIGSTOP)


def terminate_rank(target: Target) -> None:
    """SIGTERM to one rank alone: the run saves, and ends as one that was asked to."""
    os.kill(target.rank, signal.SIGTERM)


def kill_launcher(target: Target) -> None:
    """SIGKILL of the command that a person or a scheduler started."""
    os.kill(target.launcher, signal.SIGKILL)


def kill_loader(target: Target) -> None:
    """SIGKILL of one of the rank's loader processes."""
    loaders = psutil.Process(target.rank).children()
    if not loaders:
        raise ProcessLookupError("the rank has no loader process")
    loaders[0].kill()


def kill_raylet(target: Target) -> None:
    """SIGKILL of the daemon of Ray's node, and with it of all that runs there."""
    for process in psutil.Process(target.launcher).children(recursive=True):
        if process.name() == "raylet":
            process.kill()
            return
    raise ProcessLookupError("no raylet")


KINDS: dict[str, Callable[[Target], None]] = {
    "kill rank": kill_rank,
    "stop rank": stop_rank,
    "terminate rank": terminate_rank,
    "kill launcher": kill_launcher,
    "kill loader": kill_loader,
    "kill raylet": kill_raylet,
}

BY_HAND = ("kill launcher", "terminate rank")
"""Faults after which the command has to be given again."""
