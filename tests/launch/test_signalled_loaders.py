"""A signal to every process of a job, loaders among them, on each launcher: the run saves, and nothing is left."""

import os
import signal
import subprocess
import sys

import pytest
from programs import HANGS_S, SYNCBN, losses, wait_until

from syncbn.tracking import read_journal

MINE = """
import os, signal, torch
from torch.utils.data import Dataset
import syncbn.extend as extend

class Images(Dataset):
    num_classes = 2
    def __len__(self): return 64
    def __getitem__(self, i):
        is_last = os.environ.get("RANK", "0") == os.environ.get("LAST")
        if i == 13 and is_last and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1, 2, 2) * (i % 2), i % 2

@extend.data("images")
def images(root, split): return Images()
"""
RUN = ("train", "extensions=[mine]", "data=images", "data.num_loaders=1", "norm=sync", "model.hidden=[4]",
       "train.per_rank_batch=4", "train.steps=1000000", "train.eval_every=20", "train.agree_every=1",
       "optim.schedule=constant", "train.progress=false", "tracking=journal")  # fmt: skip
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "-m", "syncbn")  # fmt: skip
LAUNCHERS = {
    "one": (*SYNCBN, *RUN, "launcher.num_workers=1"),
    "local": (*SYNCBN, *RUN, "launcher.num_workers=2"),
    "torchrun": (*TORCHRUN, *RUN),
    "ray": (*SYNCBN, *RUN, "launcher=ray", "launcher.num_workers=2"),
}


def signal_group(bench, process, number):
    """As a terminal does, or a queue that knows the job by its first process."""
    os.killpg(process.pid, number)


def signal_all(bench, process, number):
    """As a service manager or a queue does that keeps an account of a job's processes."""
    for pid in bench._pids():
        os.kill(pid, number)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("send", [signal_group, signal_all])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_with_loaders_saves_when_all_its_processes_are_signalled(
    bench, tmp_path, launcher, send, number, code
):
    (tmp_path / "mine.py").write_text(MINE)
    folder = tmp_path / "runs" / "run"
    process = bench.start(*LAUNCHERS[launcher], stderr=subprocess.PIPE)
    wait_until(lambda: (folder / "journal.jsonl").exists() and len(losses(folder)) >= 2)
    send(bench, process, number)
    _, stderr = process.communicate(timeout=HANGS_S)
    if launcher != "torchrun":  # which ends with 1 itself
        assert process.returncode == code, stderr
        assert stderr.splitlines()[-1].endswith(f"stopped by signal {number}, checkpoint saved")
    *_, end = (r for r in read_journal(folder / "journal.jsonl") if r.get("event") == "end")
    assert end["status"] == "stopped"
    assert end["error"].endswith("checkpoint saved")
    assert (folder / "checkpoints" / "LATEST").is_file()
    assert not bench.left_running()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_loader_is_named_by_the_journal_on_every_launcher(bench, tmp_path, launcher):
    (tmp_path / "mine.py").write_text(MINE)
    bench.environ["LAST"] = "0" if launcher == "one" else "1"
    result = bench.run(*LAUNCHERS[launcher], "launcher.max_restarts=0")
    if launcher != "torchrun":
        assert result.returncode == 75, result.stderr
    *_, end = read_journal(tmp_path / "runs" / "run" / "journal.jsonl")
    assert end["error"].startswith("InfrastructureError: loader process ")
    assert "lack of memory" in end["error"]
    assert not bench.left_running()
