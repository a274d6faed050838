"""Kills, full disks and failing system calls during a save: the previous checkpoint is never lost."""

import errno
import os
import random
import resource
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_kit import latest, load_step, meta_at, names, no_temporary, save_step

from syncbn.checkpoint import Background, HostCopy, save
from syncbn.errors import CheckpointError


def save_in_turn(folder, step):
    save_step(folder, step)


class Beside:
    """Saves in a thread, of a state that changes in place as soon as it is copied."""

    def __init__(self):
        self.weight, self.memory, self.work = torch.empty(3, 2), HostCopy(), Background()

    def __call__(self, folder, step):
        self.weight.fill_(step)
        self.memory.rewind()
        state = {"weight": self.memory.copy(self.weight)}
        self.work.start(partial(save, folder, state, {}, meta_at(step)))
        self.weight.fill_(-1)
        self.work.wait()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("make", [lambda: save_in_turn, Beside], ids=["in turn", "beside"])
def test_a_kill_during_save_loses_nothing_that_was_saved(tmp_path, seed, make):
    kill_during_save(tmp_path, seed, make)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 320))
def test_no_kill_of_hundreds_during_a_save_beside_loses_what_was_saved(tmp_path, seed):
    kill_during_save(tmp_path, seed, Beside)


def kill_during_save(folder, seed, make):
    """A child saves in a loop and tells each step it has saved; the newest told, or a newer one, must load."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_one = make()
            for step in range(1, 100_000):
                # Every third save replaces the step before, the one case in which something must move aside.
                save_one(folder, step - (step % 3 == 0))
                os.write(writer, b".")
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        time.sleep(random.Random(seed).uniform(0, 0.06))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    told = 1
    while chunk := os.read(reader, 4096):
        told += len(chunk)
    os.close(reader)
    assert load_step(folder) >= told - (told % 3 == 0)
    save_step(folder, 200_000)
    assert no_temporary(folder)


class FailsOn:
    """Counts calls to the operating system and fails the k-th with `error`; a write does half of its work first."""

    def __init__(self, k, error):
        self.k, self.error, self.calls = k, error, 0

    def count(self):
        self.calls += 1
        if self.calls == self.k:
            raise OSError(self.error, os.strerror(self.error))

    def before(self, function):
        def wrapped(*args, **kwargs):
            self.count()
            return function(*args, **kwargs)

        return wrapped

    def opening(self, function):
        def wrapped(path, mode="r", *args, **kwargs):
            if "w" not in mode:
                return function(path, mode, *args, **kwargs)
            self.count()
            file = function(path, mode, *args, **kwargs)
            return HalfWriter(file, self)

        return wrapped


class HalfWriter:
    """A file whose write may stop half-way."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, blob):
        self.file.write(blob[: len(blob) // 2])
        self.faults.count()
        self.file.write(blob[len(blob) // 2 :])


def save_with_fault(monkeypatch, folder, step, k, error):
    """Save with the k-th system call failing; whether it was reached, and with what result."""
    faults = FailsOn(k, error)
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir"):
            patch.setattr(os, name, faults.before(getattr(os, name)))
        patch.setattr(Path, "open", faults.opening(Path.open))
        try:
            save_step(folder, step)
        except CheckpointError as caught:
            return faults.calls >= k, caught
    return faults.calls >= k, None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
def test_a_failure_at_any_call_leaves_the_previous_checkpoint(tmp_path, monkeypatch, error, step):
    k, outcomes = 0, []
    while True:
        k += 1
        folder = tmp_path / f"{k}"
        save_step(folder, 1)
        reached, caught = save_with_fault(monkeypatch, folder, step, k, error)
        if not reached:
            break
        outcomes.append(caught)
        assert load_step(folder) in (1, step)
        assert no_temporary(folder) or caught is None
        if caught is not None:
            assert os.strerror(error) in str(caught)
            assert "\n" not in str(caught)
    assert sum(caught is not None for caught in outcomes) >= 16


def test_a_real_full_disk_keeps_the_old_one(tmp_path):
    save_step(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot save checkpoint .*step-000002: File too large"
        ):
            save_step(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["LATEST", "step-000001"]
    assert load_step(tmp_path) == 1


def test_temporary_files_of_a_crashed_save_go_at_the_next_save(tmp_path):
    save_step(tmp_path, 1)
    (tmp_path / ".tmp-step-000002").mkdir()
    (tmp_path / ".tmp-step-000002" / "state.pt").write_text("half")
    (tmp_path / ".tmp-LATEST").write_text("step-0")
    assert load_step(tmp_path) == 1
    save_step(tmp_path, 2)
    assert names(tmp_path) == ["LATEST", "step-000001", "step-000002"]


def test_a_save_cut_short_before_latest_is_reported(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "LATEST").write_text("step-000001\n")
    found = latest(tmp_path)
    assert found.meta.step == 1
    assert "step-000002 is newer than LATEST" in found.notes[0]
