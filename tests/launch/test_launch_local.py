"""Ranks of this machine, killed and signalled: what the launch says of it, and what can go on from there."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from programs import HANGS_S, TRAIN, cmdline, complaint, losses, wait_until

from syncbn.compose import compose
from syncbn.launch import forks, local
from syncbn.tracking import read_journal

ENDLESS = ("tracking=journal", "model.hidden=[8]", "train.per_rank_batch=4", "train.steps=1000000",
           "optim.schedule=constant", "data=synthetic", "launcher.num_workers=2")  # fmt: skip


def start(bench, *more):
    return bench.start(*TRAIN, *ENDLESS, *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_what_the_launch_speaks_of(bench, rank):
    process = start(bench, "launcher.max_restarts=0")
    wait_for_losses(bench)
    ranks_of(process)[rank].kill()
    result = ended(process)
    assert result.returncode == 75, result.stderr
    assert f"rank {rank} died (killed by SIGKILL): start it again" in complaint(result)
    assert not bench.left_running()
    end = list(read_journal(bench.folder / "runs" / "run" / "journal.jsonl"))[-1]
    assert (end["event"], end["status"]) == ("end", "failed"), "also where rank 0 could not say so"


WHOLE = ("name=it", "tracking=journal", "model.hidden=[16]", "train.per_rank_batch=8", "train.steps=300",
         "train.checkpoint_every=20", "train.agree_every=5", "train.progress=false",
         "launcher.num_workers=2")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("resume", [True, False])
def test_a_run_whose_rank_is_killed_goes_on_by_itself_to_the_bits_of_one_that_was_not(
    bench, tmp_path, resume
):
    folders = [tmp_path / name / "it" for name in ("whole", "cut")]
    whole = bench.run(*TRAIN, *WHOLE, "runs_dir=whole")
    assert whole.returncode == 0, whole.stderr
    if not resume:  # what the restart must not go on from
        shutil.copytree(folders[0] / "checkpoints", folders[1] / "checkpoints")
    command = (*TRAIN, *WHOLE, "runs_dir=cut", f"train.resume={resume}")
    process = bench.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: (folders[1] / "journal.jsonl").exists() and len(losses(folders[1])) > 50)
    ranks_of(process)[1].kill()
    result = ended(process)
    assert result.returncode == 0, result.stderr
    assert "rank 1 died (killed by SIGKILL): restart 1 of 3, going on from step" in result.stderr
    assert losses(folders[0]) == losses(folders[1])
    states = [(f / "checkpoints/step-000300/model.safetensors").read_bytes() for f in folders]
    assert states[0] == states[1]
    events = [r["event"] for r in read_journal(folders[1] / "journal.jsonl") if "event" in r]
    story = [event for event in events if event != "checkpoint"]
    assert story == ["start", "end", "restart", "start", "resume", "end"]


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


@pytest.mark.slow
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


def test_under_torchrun_no_signal_ends_a_rank_that_records_how_it_ended(monkeypatch):
    def handler(*_):
        return signal.getsignal(signal.SIGTERM)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(local, "_work", handler)
    assert handler() is signal.SIG_DFL
    assert callable(local.launch_run(compose(["train.resume=false"])))
