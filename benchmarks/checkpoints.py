"""What saving by the clock costs a run that is left alone: turns with a save against turns without, step by step.

    python -m benchmarks.checkpoints [--brief] [RESULT.json]     # 12 minutes on 2 quiet cores; prints a table

Two loops of the service train equal networks in the same ranks and take turns, in pairs whose order alternates. A turn
is as long as the time between two saves that the service chooses for the network (`--brief`: 3 s), so that a turn of
the loop that saves has one save, or two or none where the machine was slower or faster than before. A pair gives the
ratio of the times of a step. Files go to the temporary folder: set TMPDIR to the disk that is meant.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, page, ranks
from benchmarks.clock import over_ranks, say
from benchmarks.service import CASES, ENDLESS, SILENT
from syncbn.compose import compose
from syncbn.runtime import TorchrunRuntime
from syncbn.tracking import Untracked
from syncbn.train.loop import Loop
from syncbn.train.saving import seconds_between
from syncbn.train.state import build
from syncbn.train.stopping import StopRequest

WARM_UP = 20
"""Steps before the first pair."""
BRIEF_S = 3.0
CASES = CASES | {"resnet18, adamw": (*CASES["resnet18"], "optim=adamw")}


class Contender:
    """A loop of the service, taken step by step, that saves every `every_s` seconds."""

    def __init__(self, case: str, folder: str, every_s: float) -> None:
        own = (f"runs_dir={folder}", f"name=every_{every_s:g}")
        cfg = compose(
            [*CASES[case], *ENDLESS, *SILENT, *own, f"train.checkpoint_every_s={every_s}"]
        )
        self._counted = _Counted()
        state = build(cfg, TorchrunRuntime(torch.device("cpu")))
        self.loop = Loop(state, self._counted, StopRequest())
        self._steps = self.loop.steps()

    def turn(self, num_steps: int) -> dict[str, float]:
        """Milliseconds of a step, those of the longest, and how many saves were begun and ended."""
        times, before = [], self._counted.saves
        for _ in range(num_steps):
            began = time.perf_counter()
            next(self._steps)
            times.append(1000 * (time.perf_counter() - began))
        self.loop.saving.wait()
        saves = self._counted.saves - before
        return {"step_ms": statistics.fmean(times), "longest_ms": max(times), "saves": saves}


class _Counted(Untracked):
    """Counts saves; rank 0 alone has any."""

    saves = 0

    def event(self, name: str, **fields: Any) -> None:
        """Count a save."""
        del fields
        self.saves += name == "checkpoint"


def measure(case: str, num_pairs: int, turn_s: float | None) -> dict[str, Any]:
    """The pairs of turns of one network, and what a save costs; called on every rank.

    Args:
        case: of `CASES`.
        num_pairs: turns of each loop.
        turn_s: seconds of a turn; none is the time between two saves that the service chooses.
    """
    with tempfile.TemporaryDirectory() as folder:
        alone = Contender(case, folder, 0)
        alone.turn(WARM_UP)
        step_s = alone.turn(WARM_UP)["step_ms"] / 1000
        cost_s, copy_s = _cost(alone.loop)
        between_s = seconds_between(compose([]).train, cost_s)
        turn_s = between_s if turn_s is None else turn_s
        turn_s, step_s = over_ranks([turn_s, step_s])  # the same on all
        num_steps = max(WARM_UP, round(turn_s / step_s))
        saving = Contender(case, folder, turn_s)
        saving.turn(WARM_UP)
        pairs = [_pair(number, alone, saving, num_steps) for number in range(num_pairs)]
    row = {"case": case, "between_s": round(between_s, 1), "turn_s": round(turn_s, 1)}
    row |= {"copy_ms": round(1000 * copy_s, 2), "cost_ms": round(1000 * cost_s, 2)}
    row |= summary(pairs)
    say(" ".join(f"{key}={value}" for key, value in row.items()))
    return row


def _cost(loop: Loop) -> tuple[float, float]:
    """Seconds that a save costs and those of its copy, on rank 0, the second time."""
    for _ in range(2):
        loop.saving.finish()
    spent = torch.tensor([loop.saving.cost_s, loop.saving.copy_s])
    cost_s, copy_s = loop.state.runtime.from_main(spent).tolist()
    return cost_s, copy_s


def _pair(
    number: int, alone: Contender, saving: Contender, num_steps: int
) -> dict[str, dict[str, float]]:
    order = {"alone": alone, "saving": saving}
    names = list(order) if number % 2 == 0 else list(order)[::-1]
    return {name: order[name].turn(num_steps) for name in names}


def summary(pairs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The ratio of a step with saves to one without: of each pair, their median, and what else is told of them."""
    ratios = sorted(pair["saving"]["step_ms"] / pair["alone"]["step_ms"] for pair in pairs)
    medians = {
        f"{name}_{what}": round(statistics.median(pair[name][what] for pair in pairs), 3)
        for name in ("alone", "saving")
        for what in ("step_ms", "longest_ms")
    }
    return {
        "pairs": len(pairs),
        "saves": int(sum(pair["saving"]["saves"] for pair in pairs)),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        **medians,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ("network", "saves", "every, s", "copy, ms", "cost, ms", "step, ms", "longest, ms")
    body = [
        [
            row["case"],
            f"{row['saves']} in {row['pairs']} turns",
            f"{row['turn_s']:g}",
            f"{row['copy_ms']:.1f}",
            f"{row['cost_ms']:.1f}",
            f"{row['saving_step_ms']:.2f} / {row['alone_step_ms']:.2f}",
            f"{row['saving_longest_ms']:.1f} / {row['alone_longest_ms']:.1f}",
            f"{row['ratio']:.4f} ({row['ratios'][0]:.4f} to {row['ratios'][-1]:.4f})",
        ]
        for row in rows
    ]
    return page.table((*head, "ratio (least to most)"), body)


def main() -> None:
    """Measure, print the table, and write what was measured where a file is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints")
    parser.add_argument("--brief", action="store_true", help="a minute: short turns, small network")
    parser.add_argument("result", nargs="?", type=Path, metavar="RESULT.json")
    options = parser.parse_args()
    cases, num_pairs, turn_s = (["mlp"], 3, BRIEF_S) if options.brief else (list(CASES), 4, None)
    about = machine.describe()
    job = "checkpoints:measure"
    rows = [ranks.run(job, 2, case=c, num_pairs=num_pairs, turn_s=turn_s) for c in cases]
    about["load_after"] = round(os.getloadavg()[0], 1)
    print(f"with saves / without, load {about['load_before']} to {about['load_after']}\n")
    print(table(rows))
    if options.result is not None:
        options.result.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
