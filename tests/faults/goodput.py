"""Goodput of a run one of whose ranks is killed every so many seconds: the share of its time in steps that count.

    PYTHONPATH=tests/support python tests/faults/goodput.py --minutes 10 --every 60

The seconds of a step are the median of all steps that the run took; a step that is taken again counts once. Nothing
is set of how often the run saves.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import observations
from fault_plans import Fault
from faulted_run import run_under
from programs import Bench

PAUSE_S = 0.05
"""In each step: about its length."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and print the goodput; 1 where the run did not come to its end."""
    options = _options(argv)
    steps = round(60 * options.minutes / PAUSE_S)
    every = round(options.every / PAUSE_S)
    settings = (
        f"train.steps={steps}",
        f"callbacks.observer.pause_s={PAUSE_S}",
        "launcher.max_restarts=100",
        "train.checkpoint_every=0",
    )
    chance = random.Random(options.seed)  # kills are not to keep time with saves
    faults = [
        Fault("kill rank", step - chance.randrange(every // 4), chance.randrange(2))
        for step in range(every, steps, every)
    ]
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        bench = Bench(Path(folder))
        try:
            outcome = run_under(bench, options.launcher, "run", settings, faults)
        finally:
            bench.kill_all()
        sys.stdout.write(_said(outcome) + "\n")
    return outcome.code


def _said(outcome) -> str:
    lines = observations.lines_of(outcome.folder, 0)
    each = statistics.median(b.time - a.time for a, b in pairwise(lines))
    took = lines[-1].time - lines[0].time
    useful = each * len({line.step for line in lines})
    return (
        f"goodput {useful / took:.1%} of {took:.0f} s: {len(outcome.happened)} kills, steps of {each:.3f} s, "
        f"{outcome.redone} taken again ({outcome.redone * each / took:.1%}), back after "
        f"{statistics.median(outcome.recoveries):.1f} s (median, longest {max(outcome.recoveries):.1f} s), "
        f"exit {outcome.code}"
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
