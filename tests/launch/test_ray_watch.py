"""A process that joined a cluster does not outlive the cluster's head."""

import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from programs import HANGS_S, killed

PROGRAM = """
import sys, time
from syncbn.launch import ray_watch
ray_watch.EVERY_S, ray_watch.PATIENCE_S = 0.1, 0.5
with ray_watch.ended_without(sys.argv[1]):
    print("watching", flush=True)
    time.sleep(float(sys.argv[2]))
print("done")
"""


@pytest.fixture
def head():
    """Something that listens as a head does."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield server


@contextmanager
def watched(head, seconds):
    """A process that watches `head` for `seconds`, ended by force where it does not end itself."""
    address = f"127.0.0.1:{head.getsockname()[1]}"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, address, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with killed(process):
        yield process


def test_a_process_that_joined_ends_with_75_and_a_line_when_the_head_goes(head):
    with watched(head, 2 * HANGS_S) as process:
        assert process.stdout.readline() == "watching\n"
        head.close()
        _, stderr = process.communicate(timeout=HANGS_S)
    assert process.returncode == 75
    assert stderr.startswith("syncbn: error: the head of the cluster at 127.0.0.1:")
    assert len(stderr.splitlines()) == 1


def test_a_process_that_joined_goes_on_while_the_head_answers(head):
    with watched(head, 2) as process:
        assert process.communicate(timeout=HANGS_S)[0] == "watching\ndone\n"
    assert process.returncode == 0
