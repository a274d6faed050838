"""Ranks of this machine, killed and signalled: what the launch says of it, and what can go on from there."""

import signal
import subprocess
import time

import psutil
import pytest
from programs import TRAIN, Bench, complaint, losses

ENDLESS = ("tracking=journal", "model.hidden=[8]", "train.per_rank_batch=4", "train.steps=1000000",
           "optim.schedule=constant", "data=synthetic", "launcher.num_workers=2")  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def start(bench):
    return subprocess.Popen(
        [*TRAIN, *ENDLESS],
        cwd=bench.folder,
        env=bench.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """The launch once it is over, with what it said."""
    stdout, stderr = process.communicate(timeout=90)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def ranks_of(process, number=2):
    """Its ranks, once they are there: the processes that a spawn started."""
    deadline = time.monotonic() + 90
    while True:
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if len(ranks) == number:
            return ranks
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_losses(bench):
    deadline = time.monotonic() + 90
    folder = bench.folder / "runs" / "run"
    while not (folder / "journal.jsonl").exists() or not losses(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_what_the_launch_speaks_of(bench, rank):
    process = start(bench)
    wait_for_losses(bench)
    sorted(ranks_of(process), key=lambda rank: rank.create_time())[rank].kill()
    result = ended(process)
    assert result.returncode == 75, result.stderr
    assert f"rank {rank} died" in complaint(result)
    assert not bench.left_running()


def test_a_signal_to_the_launch_says_that_a_checkpoint_was_saved(bench):
    process = start(bench)
    wait_for_losses(bench)
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    assert (result.returncode, complaint(result)) == (
        143,
        "syncbn: error: stopped by signal 15, checkpoint saved",
    )
    assert (bench.folder / "runs" / "run" / "checkpoints" / "LATEST").is_file()


def test_a_signal_while_ranks_start_claims_a_checkpoint_only_where_there_is_one(bench):
    process = start(bench)
    ranks_of(process)
    process.send_signal(signal.SIGTERM)
    result = ended(process)
    assert result.returncode == 143
    saved = (bench.folder / "runs" / "run" / "checkpoints" / "LATEST").is_file()
    how = ", checkpoint saved" if saved else " before a checkpoint could be saved"
    assert complaint(result).endswith(f"stopped by signal 15{how}")
