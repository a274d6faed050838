"""One exchange between ranks, without a layer around it: microseconds against payload and number of ranks.

Exchanges are timed in bursts, back to back, because one alone is shorter than two ranks can agree on a start.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from benchmarks.clock import interleaved, say
from benchmarks.contenders import Run, group_by
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.fingerprint import BACKWARD, Fingerprint

BURST = 20
"""Exchanges timed at once."""


def measure(channels: Sequence[int], budget_s: float) -> list[dict[str, Any]]:
    """A row a number of channels C, in microseconds an exchange; called on every rank.

    `shared`, `sockets` and `gloo` gather the 2C float32 of a backward pass as the layer does, headers compared: the way
    it chooses by itself, which is memory where native kernels are built; through connections of its own; through gloo.
    `reduction` is gloo's bare all-reduce of the 2C + 1 float64 that many ranks would send instead.
    """
    world = dist.group.WORLD
    assert world is not None
    rows = []
    for c in channels:
        runs = {
            "shared": _gather(world, c),
            "sockets": _gather(group_by("sockets"), c),
            "gloo": _gather(group_by("gloo"), c),
            "reduction": _reduction(c),
        }
        timed = interleaved(runs, budget_s)
        us = {name: round(ms * 1e3 / BURST, 2) for name, ms in timed["ms"].items()}
        place = {"world_size": dist.get_world_size(), "channels": c, "payload_bytes": 8 * c}
        rows.append({**place, "us": us, "rounds": timed["rounds"]})
        say(f"{place['world_size']} ranks, {c} channels: {us} us")
    return rows


def _gather(group: ProcessGroup, channels: int) -> Run:
    values, exchange = torch.randn(2 * channels), exchange_of(group)
    what = Fingerprint("exchange", channels, values.dtype, needs_grad=True)

    def run() -> None:
        for _ in range(BURST):
            exchange.gather(values, BACKWARD, what)

    return run


def _reduction(channels: int) -> Run:
    values = torch.zeros(2 * channels + 1, dtype=torch.float64)

    def run() -> None:
        for _ in range(BURST):
            dist.all_reduce(values)

    return run
