"""One layer, forward and backward: ours against its peers, case by case."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Case, all_cases
from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import installed, runs_for


def measure(
    contenders: Sequence[str],
    budget_s: float,
    shapes: Sequence[Sequence[int]],
    layouts: Sequence[str],
    dtypes: Sequence[str],
) -> list[dict[str, Any]]:
    """A row a case, with the median milliseconds of each contender that is installed; called on every rank.

    Args:
        contenders: names in `contenders.LAYERS` or `contenders.FLOORS`.
        budget_s: seconds to spend on a case.
        shapes: `(N, C, H, W)` of a rank's input.
        layouts: names in `cases.LAYOUTS`.
        dtypes: names in `cases.DTYPES`.
    """
    names = installed(contenders)
    return [
        _row(case, names, budget_s)
        for case in all_cases(
            tuple((n, c, h, w) for n, c, h, w in shapes), tuple(layouts), tuple(dtypes)
        )
    ]


def _row(case: Case, names: Sequence[str], budget_s: float) -> dict[str, Any]:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    place = {"world_size": world_size, "threads": torch.get_num_threads()}
    row = {**place, **case.row(), **interleaved(runs_for(case, names), budget_s)}
    say(f"{case} {words(row)}")
    return row
