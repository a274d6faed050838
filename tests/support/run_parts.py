"""What `make test` runs: the tests of the layer under coverage, its gate of 100 %, then all other tests.

Every part runs, also after one that failed. The last line counts the tests of all parts: `N passed, N failed,
N skipped`; an error in a fixture, or while tests are collected, counts as failed. The exit status is 0 where every part
succeeded, 1 otherwise.

    python tests/support/run_parts.py --numprocesses 2      options are pytest's
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PYTEST = (sys.executable, "-m", "pytest")
COVERAGE = (sys.executable, "-m", "coverage")
CHOSEN = "not gpu and not slow"


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


def parts_of(options: Sequence[str]) -> list[Part]:
    """The parts of `make test`; `options` go to pytest."""
    layer = (*PYTEST, *options, "-m", f"{CHOSEN} and layer", "--cov", "--cov-report=")
    gate = ("report", "--include", "syncbn/norm/*", "--skip-covered", "--show-missing")
    others = (*PYTEST, *options, "-m", f"{CHOSEN} and not layer")
    return [
        Part("tests of the layer", layer),
        Part("coverage of the layer", (*COVERAGE, *gate, "--fail-under", "100"), is_pytest=False),
        Part("other tests", others),
    ]


def run(parts: Sequence[Part]) -> int:
    """Run each of `parts`, name those that failed, and print the counts of all; returns the exit status."""
    all_counts, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            report = Path(folder) / f"{number}.xml"
            options = [f"--junitxml={report}"] if part.is_pytest else []
            status = subprocess.run([*part.command, *options], check=False).returncode
            if status != 0:
                failures.append(f"{part.name} (exit status {status})")
            if part.is_pytest:
                all_counts.append(counts_of(report, status))
    if failures:
        print(f"failed: {', '.join(failures)}")
    print(Counts(*(sum(column) for column in zip(*all_counts, strict=True))), flush=True)
    return 1 if failures else 0


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
