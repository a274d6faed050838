"""Wall times of functions that take turns.

Contenders are interleaved in an order shuffled anew each round, so that a busy moment of the machine hits all of
them; medians over many rounds forget it. Ranks start each function together, as after equal work; a barrier of
sockets lets them go up to a millisecond apart, so they agree on a time instead.
"""

import random
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import Run

ROUNDS = (5, 200)
"""Fewest and most rounds of a case."""
AHEAD_NS = 1_000_000
"""How far in the future ranks agree to start: by then all have learnt of it, and woken."""
SPIN_NS = 150_000
"""For how long they spin at the end of that, which is more exact than sleeping."""


def interleaved(runs: Mapping[str, Run], budget_s: float) -> dict[str, Any]:
    """Median milliseconds of each of `runs`, averaged over ranks, and the number of rounds.

    Args:
        runs: by name; the same names in the same order on every rank.
        budget_s: seconds to spend, within `ROUNDS`.
    """
    one_round(runs, list(runs))  # warms up
    start = time.perf_counter()
    one_round(runs, list(runs))
    num_rounds = rounds_within(budget_s, time.perf_counter() - start)
    order = random.Random(0)  # the same on every rank
    rounds = [one_round(runs, order.sample(list(runs), len(runs))) for _ in range(num_rounds)]
    medians = [statistics.median(r[name] for r in rounds) for name in runs]
    return {"ms": dict(zip(runs, over_ranks(medians), strict=True)), "rounds": num_rounds}


def one_round(runs: Mapping[str, Run], order: list[str]) -> dict[str, float]:
    """Milliseconds of each of `runs`, run once in `order`."""
    return {name: milliseconds(runs[name]) for name in order}


def milliseconds(run: Run) -> float:
    """Wall time of one call that all ranks begin together."""
    start_together()
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def start_together() -> None:
    """Return at the same time on every rank, as good as the clock they share."""
    if not dist.is_initialized():
        return
    start = torch.tensor([time.perf_counter_ns() + AHEAD_NS])
    dist.all_reduce(start, op=dist.ReduceOp.MAX)
    time.sleep(max(0, int(start) - SPIN_NS - time.perf_counter_ns()) / 1e9)
    while time.perf_counter_ns() < int(start):
        pass


def rounds_within(budget_s: float, round_s: float) -> int:
    """As many rounds as fit the budget by rank 0's clock, within `ROUNDS`."""
    num_rounds = torch.tensor([int(budget_s / round_s)]).clamp(*ROUNDS)
    if dist.is_initialized():
        dist.broadcast(num_rounds, src=0)
    return int(num_rounds)


def over_ranks(values: list[float]) -> list[float]:
    """The mean of each value over ranks, to a nanosecond where they are milliseconds."""
    mean = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return [round(value, 6) for value in mean.tolist()]


def say(text: str) -> None:
    """Print a line of progress, once for all ranks."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(" ", text, flush=True)


def words(timed: Mapping[str, Any]) -> str:
    """What `interleaved` returned, in a line."""
    times = "  ".join(f"{name} {ms:.2f}" for name, ms in timed["ms"].items())
    return f"[{timed['rounds']}] {times} ms"
