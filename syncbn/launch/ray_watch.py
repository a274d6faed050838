"""Ends this process when the head of the cluster that it joined has died.

Ray's own calls wait a minute for a head that does not answer, some of them repeatedly, and then end the process without
a message of ours. So a thread tests the connection to the head, which no call that hangs can delay.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.errors import InfrastructureError
from syncbn.launch.periodic import periodically

EVERY_S, KNOCK_S = 2.0, 2.0
PATIENCE_S = 20.0
"""Long enough for Ray to name the cause itself, which takes it about 10 s, and for a head to be restarted."""


@contextmanager
def ended_without(address: str) -> Iterator[None]:
    """End this process with 75 once nothing has answered at `address` (host:port) for `PATIENCE_S` seconds."""
    host, _, port = address.rpartition(":")
    answered_at = time.monotonic()

    def look() -> None:
        nonlocal answered_at
        if _answers(host, int(port)):
            answered_at = time.monotonic()
        elif time.monotonic() - answered_at > PATIENCE_S:
            _give_up(address)

    with periodically(look, EVERY_S):
        yield


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except OSError:
        return False
    return True


def _give_up(address: str) -> None:
    sys.stderr.write(
        f"syncbn: error: the head of the cluster at {address} has died: the same command continues on another\n"
    )
    sys.stderr.flush()
    os._exit(InfrastructureError.exit_code)
