"""The README's commands and its Python block, run as they stand there, only shorter."""

import re
import shlex
from pathlib import Path

import pytest
from programs import ROOT, Bench
from ranks import started_by_torchrun

README = (ROOT / "README.md").read_text()
NEEDS_A_CLUSTER = ("status", "logs", "stop", "jobs")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    command
    for block in _blocks("sh")
    for command in (line.split("  #")[0].strip() for line in block.splitlines())
    if command and not command.startswith("#")
]


def _short(command: str, runs: Path) -> list[str]:
    """`command` so that it does in seconds what it does, or says what it would do where it needs more."""
    words = shlex.split(command)
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words[0] == "syncbn" and words[1] in NEEDS_A_CLUSTER:
        return [*words[:2], "--help"]
    if words[0] == "torchrun":
        words.insert(1, "--standalone")  # a port of its own
    shorter = ["debug=tiny", f"runs_dir={runs}"]
    shorter += ["study.seeds=[0,1]"] if any(w.startswith("study=") for w in words) else []
    if "submit" in words or "launcher=ray" in words:
        shorter.append("--dry-run")
    return [*words, *shorter]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_does_its_work(command: str, bench: Bench) -> None:
    words = _short(command, bench.folder)
    done = bench.run(*words, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    if f"runs_dir={bench.folder}" in words and "--dry-run" not in words:
        assert list(bench.folder.glob("*/summary.json"))


@pytest.mark.world_size(2)
def test_the_python_block_of_the_readme_runs_on_two_ranks(world_size: int) -> None:
    with started_by_torchrun() as told:
        assert told["WORLD_SIZE"] == str(world_size)
        exec(_blocks("python")[0], {"__name__": "__main__"})


@pytest.mark.slow
def test_the_python_block_of_the_readme_runs_under_torchrun(bench: Bench) -> None:
    script = bench.folder / "example.py"
    script.write_text(_blocks("python")[0])
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", str(script))
    done = bench.run(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
