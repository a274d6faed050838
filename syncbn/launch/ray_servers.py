"""Ray's servers on this machine for one launch. Imports nothing of Ray: they start while the launch still composes."""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from syncbn.launch import ray_supervisor
from syncbn.launch.ray_access import prepare_own
from syncbn.signals import held_back

NAMES = {"gcs_server": "the head process (GCS)", "raylet": "the node process (raylet)"}
"""The processes without which a cluster of one machine is none, by name."""

THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For workers that start before a run has said how many it wants; its ranks set that themselves."""


class Servers:
    """Started at once; they and their folder are gone after `end`, and when this process has ended, however it did."""

    def __init__(self) -> None:
        prepare_own()
        self._folder = tempfile.mkdtemp(prefix="syncbn-", dir="/tmp")  # sockets need a short path
        command = [sys.executable, ray_supervisor.__file__, self._folder, *_command(self._folder)]
        with held_back():
            self._supervisor = subprocess.Popen(
                command, stdin=subprocess.PIPE, start_new_session=True, env=os.environ | THREADS
            )
        self._known: dict[str, psutil.Process] = {}

    def address(self) -> str | None:
        """`host:port` of the head process, once it listens."""
        for path in Path(self._folder).glob("session_latest/gcs_server_port_*"):
            if port := path.read_text().strip():
                return f"127.0.0.1:{port}"
        return None

    def have_failed(self) -> bool:
        """Whether the command that starts them has ended."""
        return (
            self._supervisor.poll() is not None
            or (Path(self._folder) / ray_supervisor.ENDED).exists()
        )

    def said(self) -> str:
        """What that command said, in one line."""
        return " ".join(
            (Path(self._folder) / ray_supervisor.LOG).read_text(errors="replace").split()
        )

    def dead(self) -> list[str]:
        """Those that have died since they were first asked for."""
        if not self._known:
            self._known = {p.name(): p for p in self._children() if p.name() in NAMES}
        return [NAMES[name] for name, process in self._known.items() if not _lives(process)]

    def end_processes(self) -> None:
        """Kill them and all that they have started."""
        ray_supervisor.end_all(self._folder)

    def end(self) -> None:
        """Leave nothing of them."""
        self._supervisor.communicate()

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._supervisor.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(folder: str) -> list[str]:
    """`ray start` for this machine's CPUs and GPUs, with what a launch uses of a cluster."""
    # Its service for clients on other machines, which asks for the token as the rest does, wants a port of its own.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", "--port=0", f"--ray-client-server-port={port}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"),
        *("--include-dashboard=false", "--no-monitor", "--include-log-monitor=false"),
        *("--disable-usage-stats", f"--num-cpus={len(os.sched_getaffinity(0))}"),
    ]


def start_early() -> None:
    """Start the servers that `own_servers` will be asked for; they end with this process where it is not."""
    _early.append(Servers())
    atexit.register(drop_early)


def own_servers() -> Servers:
    """Those that were started early, or new ones."""
    return _early.pop() if _early else Servers()


def drop_early() -> None:
    """End those that were started early and not asked for."""
    while _early:
        _early.pop().end()


_early: list[Servers] = []
