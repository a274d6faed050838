"""How failures leave a program: one line, the right exit code, nothing lost."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from syncbn.cli import cli
from syncbn.cli.guard import invoke, logged
from syncbn.errors import DataError, NonFinite, RankFailed, Stopped
from syncbn.launch.streams import Unbreakable


def failing_with(error):
    @click.command()
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such folder"), 3),
        (NonFinite("loss is nan"), 8),
        (RankFailed("rank 1 says no", 5), 5),
        (Stopped(15), 143),
    ],
)
def test_an_expected_failure_is_one_line_and_its_code(error, code, capsys):
    assert invoke(failing_with(error), []) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("syncbn: error: ")


@pytest.mark.parametrize("error", [DataError, ValueError])
def test_what_is_printed_of_a_failure_has_no_password(error, capsys):
    invoke(failing_with(error("at http://u:pass@word@host")), [])
    said = capsys.readouterr().err
    assert "http://***@host" in said
    assert "word" not in said


def test_a_current_folder_that_is_gone_is_named(tmp_path, monkeypatch, capsys):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert invoke(cli, ["train", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the current folder cannot be read" in line


@pytest.mark.parametrize(
    "start", [b'{"event": "start"}\n', b'{"event": "sta\xff\n', b"[1]\n", b"oops\n"]
)
def test_a_damaged_journal_is_not_shipped_and_named(start, tmp_path, capsys):
    (tmp_path / "journal.jsonl").write_bytes(start)
    assert invoke(cli, ["ship", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "journal.jsonl is damaged" in line


def test_a_full_disk_is_one_line_and_worth_another_try(capsys):
    assert invoke(failing_with(OSError(errno.ENOSPC, "No space left on device", "/x")), []) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("syncbn: error: OSError: [Errno 28] No space left on device: '/x'")


def test_where_no_file_is_named_that_did_not_fit_what_may_be_full_is_said(capsys):
    assert invoke(failing_with(OSError(errno.ENOSPC, "No space left on device")), []) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device (a disk, or /dev/shm: see `df`)" in line


def test_ctrl_c_says_nothing(capsys):
    assert invoke(failing_with(KeyboardInterrupt()), []) == 130
    assert not capsys.readouterr().err.strip()


def test_a_bug_shows_its_traceback_and_ends_in_one_line(capsys):
    assert invoke(failing_with(ValueError("oops")), []) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert re.fullmatch(r"syncbn: error: ValueError: oops at \w+\.py:\d+", lines[-1])


def test_a_message_of_several_lines_becomes_one(capsys):
    invoke(failing_with(DataError("first\n  second")), [])
    assert capsys.readouterr().err == "syncbn: error: first second\n"


@pytest.mark.parametrize("argv", [["--nope"], ["nope"], ["ui", "--port", "70000"], ["status"]])
def test_wrong_usage_is_one_line_and_2(argv, capsys):
    assert invoke(cli, argv, prog_name="syncbn") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_runs_failure_is_kept_in_its_log(tmp_path, capsys):
    @click.command()
    def command():
        with logged(tmp_path):
            raise ValueError("oops")

    assert invoke(command, []) == 1
    assert "Traceback" in (tmp_path / "error.log").read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("syncbn: error: ValueError: oops at ")
    assert line.endswith(f"(traceback in {tmp_path / 'error.log'})")


def test_a_ranks_traceback_is_kept_rather_than_the_launchers(tmp_path):
    with pytest.raises(RankFailed), logged(tmp_path):
        raise RankFailed("KeyError: 'x'", 1, "Traceback of rank 1")
    assert (tmp_path / "error.log").read_text() == "Traceback of rank 1"


def test_a_stop_leaves_no_error_log(tmp_path):
    with pytest.raises(Stopped), logged(tmp_path):
        raise Stopped(2)
    assert not (tmp_path / "error.log").exists()


def test_of_several_ranks_only_the_first_to_fail_complains(tmp_path, monkeypatch, capsys):
    for rank in (1, 0):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert invoke(failing_with(DataError(f"as seen by rank {rank}")), []) == 3
    assert capsys.readouterr().err == "syncbn: error: as seen by rank 1\n"


def test_writing_to_a_full_disk_is_given_up_quietly():
    with Path("/dev/full").open("w") as full:
        stream = Unbreakable(full)
        stream.write("x" * 100_000)
        stream.flush()
        assert os.path.samestat(os.fstat(full.fileno()), Path(os.devnull).stat())


def test_writing_to_a_closed_pipe_is_given_up_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        stream = Unbreakable(pipe)
        stream.write("x")
        stream.flush()
        stream.write("more")
        stream.flush()


def test_an_unbreakable_stream_passes_on_what_it_can(capsys):
    Unbreakable(sys.stdout).write("hello")
    assert capsys.readouterr().out == "hello"


def test_the_interpreter_ends_without_a_word_where_triton_is_imported():
    pytest.importorskip("triton")
    ends = "import sys, triton; from syncbn.cli import cli; from syncbn.cli.guard import invoke"
    command = [sys.executable, "-c", f"{ends}; sys.exit(invoke(cli, ['version']))"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
