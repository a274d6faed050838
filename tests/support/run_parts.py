"""What `make test` runs: the tests of the layer under coverage and its gate of 100 %, beside them all other tests.

The layer's tests wait for each other's ranks, and for clocks, about half of their time; the others fill it. Their
output comes after that of the layer's.

Byte code is kept, also where PYTHONDONTWRITEBYTECODE is set: the tests start some hundred processes, and each would
compile what it imports.

Every part runs, also after one that failed. The last line counts the tests of all parts: `N passed, N failed,
N skipped`; an error in a fixture, or while tests are collected, counts as failed. The exit status is 0 where every part
succeeded, 1 otherwise.

    python tests/support/run_parts.py --numprocesses 2      options are pytest's
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PYTEST = (sys.executable, "-m", "pytest")
COVERAGE = (sys.executable, "-m", "coverage")
CHOSEN = "not gpu and not slow"
WITHOUT_BYTE_CODE = "PYTHONDONTWRITEBYTECODE"


class Part(NamedTuple):
    """A command, its name, and whether it is pytest, whose tests are counted."""

    name: str
    command: tuple[str, ...]
    is_pytest: bool = True


class Counts(NamedTuple):
    """How many tests ended how."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


class Outcome(NamedTuple):
    """How a part ended; `counts` is None where it has no tests."""

    name: str
    status: int
    counts: Counts | None


def parts_of(options: Sequence[str]) -> list[list[Part]]:
    """The parts of `make test`, those of a list one after the other; `options` go to pytest."""
    layer = (*PYTEST, *options, "-m", f"{CHOSEN} and layer", "--cov", "--cov-report=")
    gate = ("report", "--include", "syncbn/norm/*", "--skip-covered", "--show-missing")
    others = (*PYTEST, *options, "-m", f"{CHOSEN} and not layer")
    return [
        [
            Part("tests of the layer", layer),
            Part(
                "coverage of the layer", (*COVERAGE, *gate, "--fail-under", "100"), is_pytest=False
            ),
        ],
        [Part("other tests", others)],
    ]


def run(lists: Sequence[Sequence[Part]]) -> int:
    """Run `lists` beside each other, name the parts that failed, and print the counts of all.

    Args:
        lists: of parts that run one after the other; those of the first print as they go.

    Returns:
        The exit status.
    """
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:
        folder = Path(temporary)
        logs = [folder / f"{number}.log" for number in range(1, len(lists))]
        beside = [
            pool.submit(_run_list, parts, log) for parts, log in zip(lists[1:], logs, strict=True)
        ]
        outcomes = _run_list(lists[0], folder / "0.log", shown=True)
        for future, log in zip(beside, logs, strict=True):
            outcomes += future.result()
            print(log.read_text(), end="")
    failures = [f"{name} (exit status {status})" for name, status, _ in outcomes if status != 0]
    if failures:
        print(f"failed: {', '.join(failures)}")
    counts = [counts for _, _, counts in outcomes if counts is not None]
    print(Counts(*(sum(column) for column in zip(*counts, strict=True))), flush=True)
    return 1 if failures else 0


def _run_list(parts: Sequence[Part], log: Path, shown: bool = False) -> list[Outcome]:
    """Run `parts` one after the other, their output in `log` unless it is `shown`."""
    environment = {name: v for name, v in os.environ.items() if name != WITHOUT_BYTE_CODE}
    outcomes = []
    with log.open("w") as file:
        for number, part in enumerate(parts):
            report = log.with_suffix(f".{number}.xml")
            options = [f"--junitxml={report}"] if part.is_pytest else []
            output = {} if shown else {"stdout": file, "stderr": subprocess.STDOUT}
            status = subprocess.run(
                [*part.command, *options], check=False, env=environment, **output
            ).returncode
            counts = counts_of(report, status) if part.is_pytest else None
            outcomes.append(Outcome(part.name, status, counts))
    return outcomes


def counts_of(report: Path, status: int) -> Counts:
    """The counts in a JUnit report of pytest's; where it failed and counts no failure, it is one itself."""
    passed = failed = skipped = 0
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            left_out = int(suite.get("skipped", 0))
            passed += int(suite.get("tests", 0)) - bad - left_out
            failed, skipped = failed + bad, skipped + left_out
    return Counts(passed, failed or int(status != 0), skipped)


if __name__ == "__main__":
    raise SystemExit(run(parts_of(sys.argv[1:])))
