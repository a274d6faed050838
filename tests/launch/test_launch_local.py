"""Ranks of this machine, killed and signalled: what the launch says of it, and what can go on from there."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from programs import HANGS_S, TRAIN, cmdline, complaint, losses, wait_until

from syncbn.launch import forks

ENDLESS = ("tracking=journal", "model.hidden=[8]", "train.per_rank_batch=4", "train.steps=1000000",
           "optim.schedule=constant", "data=synthetic", "launcher.num_workers=2")  # fmt: skip


def start(bench):
    return bench.start(*TRAIN, *ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    """The launch once it is over, with what it said."""
    stdout, stderr = process.communicate(timeout=HANGS_S)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def ranks_of(process, number=2):
    """Its ranks, once they are there: the forks of the server that it started."""
    ranks = []

    def there():
        children = psutil.Process(process.pid).children()
        servers = [
            child for child in children if "multiprocessing.forkserver" in cmdline(child.pid)
        ]
        ranks[:] = [rank for server in servers for rank in server.children()]
        return len(ranks) == number

    wait_until(there)
    return sorted(ranks, key=lambda rank: rank.create_time())


def wait_for_losses(bench):
    folder = bench.folder / "runs" / "run"
    wait_until(lambda: (folder / "journal.jsonl").exists() and losses(folder))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_what_the_launch_speaks_of(bench, rank):
    process = start(bench)
    wait_for_losses(bench)
    ranks_of(process)[rank].kill()
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_the_job_says_that_a_checkpoint_was_saved(bench, number):
    process = start(bench)
    wait_for_losses(bench)
    os.killpg(process.pid, number)
    result = ended(process)
    assert (result.returncode, complaint(result)) == (
        143,
        "syncbn: error: stopped by signal 15, checkpoint saved",
    )


def test_ranks_save_and_end_when_the_launch_is_killed(bench):
    process = start(bench)
    wait_for_losses(bench)
    process.kill()
    ended(process)
    assert not bench.left_running()
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


def test_a_rank_has_the_environment_of_who_starts_it_and_not_of_an_older_server(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(forks, "_OF_THE_SERVER", {"KEPT": "1", "CHANGED": "1", "GONE": "1"})
    os.environ.clear()
    os.environ.update({"KEPT": "1", "CHANGED": "1", "GONE": "1", "RANK": "3"})
    forks.take_environment({"KEPT": "1", "CHANGED": "2", "NEW": "1"})
    assert dict(os.environ) == {"KEPT": "1", "CHANGED": "2", "NEW": "1", "RANK": "3"}


TWICE = """
import os
from syncbn.compose import compose
from syncbn.launch.local import launch_run

if __name__ == "__main__":
    for number in ("1", "2"):
        os.environ["NUMBER"] = number
        launch_run(compose(["debug=tiny", "launcher.num_workers=2", "callbacks.told={}",
                            "extensions=[mine]", f"name=r{number}"]))
"""
TOLD = """
import os
import syncbn.extend as extend

@extend.callback("told")
class Told(extend.Callback):
    def start(self, moment):
        moment.record(number=float(os.environ["NUMBER"]))
"""


@pytest.mark.slow
def test_a_second_run_of_one_process_has_the_environment_as_it_is_then(bench):
    (bench.folder / "twice.py").write_text(TWICE)
    (bench.folder / "mine.py").write_text(TOLD)
    done = bench.run(sys.executable, "twice.py")
    assert done.returncode == 0, done.stderr
    for number in (1, 2):
        journal = (bench.folder / "runs" / f"r{number}" / "journal.jsonl").read_text()
        assert f'"number": {number}.0' in journal
