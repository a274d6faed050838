"""What the system tells of processes and threads, and what follows where it tells nothing."""

import os
import threading
from contextlib import contextmanager

from syncbn.norm.comm import processes
from syncbn.norm.comm.processes import Process, activity

ELSEWHERE = Process(1, 0, "another machine")


def test_a_later_process_of_the_same_id_is_not_mistaken_for_it():
    own = Process.own()
    assert own.state() in "RS"
    assert own._replace(started=own.started - 1).state() == "X"


def test_what_the_system_does_not_tell_is_unknown(monkeypatch):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    own = Process.own()
    monkeypatch.setattr(processes, "_stat", refuse)
    assert own.state() == ""
    assert Process.own() == Process(os.getpid(), 0, "")
    assert not processes.Thread().sleeps()
    monkeypatch.setattr(processes, "_boot", refuse)
    assert processes.machine() == ""
    assert processes.host() == processes.socket.gethostname()
    assert ELSEWHERE.state() == ""


@contextmanager
def _blocked(call):
    """What a thread that is blocked in `call` looks like, from its innermost frame."""
    seen = []

    def run():
        seen.append(processes.Thread())
        call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not (seen and seen[0].sleeps() and seen[0].frame().f_code.co_name != "run"):
        pass
    yield seen[0]
    thread.join()


def test_a_thread_that_waits_sleeps_and_uses_no_processor_time():
    event = threading.Event()
    with _blocked(event.wait) as thread:
        used_s = thread.used_s()
        assert thread.used_s() == used_s
        assert activity(thread.frame()).collective is None
        event.set()
