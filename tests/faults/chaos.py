"""Runs under seeded faults, one after the other, and a table of what came of them.

Each run has the settings of an undisturbed one of its launcher, whose losses, parameters and samples it must end with.
`goodput` is the share of its time in which it took steps that it would have taken undisturbed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import fault_plans
import faulted_run
import observations
from programs import Bench

KINDS = {
    "local": ("kill rank", "stop rank", "kill launcher"),
    "torchrun": ("kill rank", "kill launcher"),
    "ray": ("kill rank", "kill launcher", "kill raylet"),
}
STEPS = 200
SETTINGS = (
    f"train.steps={STEPS}",
    "callbacks.observer.pause_s=0.02",
    "launcher.max_restarts=20",
    "launcher.timeout_s=5",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run for the minutes given; 1 where a run did not end as it would have undisturbed, or left a process."""
    options = _options(argv)
    limit = time.monotonic() + 60 * options.minutes
    rows: list[tuple[str, faulted_run.Outcome, list[str], float]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        bench = Bench(Path(folder))
        try:
            whole = {
                one: faulted_run.run_under(bench, one, f"{one}-whole", SETTINGS)
                for one in options.launchers
            }
            seed = options.seed
            while time.monotonic() < limit:
                launcher = options.launchers[seed % len(options.launchers)]
                rows.append(_one(bench, launcher, seed, whole[launcher]))
                sys.stdout.write(_said(seed, *rows[-1]) + "\n")
                sys.stdout.flush()
                seed += 1
        finally:
            bench.kill_all()
    sys.stdout.write(table(rows) + "\n")
    return int(any(outcome.code or different or outcome.left for _, outcome, different, _ in rows))


def _one(bench: Bench, launcher: str, seed: int, whole: faulted_run.Outcome):
    """The launcher, what came of it under the faults of `seed`, what it is not as it should be in, its goodput."""
    faults = fault_plans.plan(seed, KINDS[launcher], 2, STEPS, num_ranks=2)
    outcome = faulted_run.run_under(bench, launcher, f"{launcher}-{seed}", SETTINGS, faults)
    different = observations.differences(outcome.folder, whole.folder, num_ranks=2)
    return (
        launcher,
        outcome,
        different,
        _seconds_of_steps(whole.folder) / _seconds_of_steps(outcome.folder),
    )


def _seconds_of_steps(folder: Path) -> float:
    """From the first step of rank 0 to its last."""
    lines = observations.lines_of(folder, 0)
    return lines[-1].time - lines[0].time if len(lines) > 1 else float("nan")


def _said(
    seed: int, launcher: str, outcome: faulted_run.Outcome, different: list[str], goodput: float
) -> str:
    faults = ", ".join(f"{one.kind} {one.rank} at {one.step}" for one in outcome.happened) or "none"
    back = ", ".join(f"{one:.1f}" for one in outcome.recoveries)
    wrong = "; ".join([*different, *(f"left: {one}" for one in outcome.left)]) or "as undisturbed"
    return (
        f"{seed} {launcher}: {faults}; back after {back} s; exit {outcome.code}, "
        f"{outcome.again} times by hand, {outcome.redone} steps again, goodput {goodput:.0%}: {wrong}"
    )


def table(rows: Sequence[tuple[str, faulted_run.Outcome, list[str], float]]) -> str:
    """A line a launcher and a line a kind of fault."""
    titles = ("launcher", "runs", "as undisturbed", "faults", "back after, s: median, longest",
              "by hand", "steps again", "goodput", "left")  # fmt: skip
    lines = ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for launcher in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == launcher]
        outcomes = [outcome for _, outcome, _, _ in own]
        back = [one for outcome in outcomes for one in outcome.recoveries]
        right = sum(not (outcome.code or different) for _, outcome, different, _ in own)
        times = f"{statistics.median(back):.1f}, {max(back):.1f}" if back else ""
        lines.append(
            f"| {launcher} | {len(own)} | {right} | {sum(len(s.happened) for s in outcomes)} | {times} "
            f"| {sum(s.again for s in outcomes)} | {sum(s.redone for s in outcomes)} "
            f"| {statistics.median(row[3] for row in own):.0%} | {sum(len(s.left) for s in outcomes)} |"
        )
    kinds = Counter(fault.kind for _, outcome, _, _ in rows for fault in outcome.happened)
    return "\n".join([*lines, "", ", ".join(f"{kind}: {number}" for kind, number in kinds.items())])


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", choices=list(KINDS), default=list(KINDS))
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
