"""Starts the servers of a launch's own cluster, and leaves nothing of it behind, however the launch ends.

A program by itself: `python ray_supervisor.py FOLDER COMMAND...`, whose standard input the launch holds open. When the
launch is gone, Ray's servers would wait a minute for it, and leave their folder. Run by its path, it imports nothing of
the package.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil

MARK = "SYNCBN_CLUSTER"
"""The variable that all processes of a cluster inherit, with the cluster's folder; a parent may be gone."""
LOG = "start.log"
"""What the command says, in the cluster's folder."""
ENDED = "ended"
"""A file there from when the command has ended."""


def main(folder: str, *command: str) -> None:
    """Run `command`, wait for the end of the input, then end all processes of the cluster, and remove `folder`."""
    with (Path(folder) / LOG).open("wb") as log:
        servers = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {MARK: folder},
        )
    threading.Thread(target=_note_end, args=(servers, folder), daemon=True).start()
    sys.stdin.read()
    end_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _note_end(servers: subprocess.Popen[bytes], folder: str) -> None:
    servers.wait()
    with contextlib.suppress(OSError):
        (Path(folder) / ENDED).touch()


def end_all(folder: str) -> None:
    """Kill every process of the cluster in `folder`, also those that are started meanwhile."""
    while processes := cluster_in(folder):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=0.1)


def cluster_in(folder: str) -> list[psutil.Process]:
    """The processes of the cluster in `folder`."""
    return [process for process in psutil.process_iter() if _is_of(folder, process)]


def _is_of(folder: str, process: psutil.Process) -> bool:
    """Whether it has the mark, or a log in `folder`: Ray's agents write their name over their environment."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(MARK) == folder:
            return True
        of_ray = process.name().startswith("ray::")
        return of_ray and any(file.path.startswith(folder) for file in process.open_files())
    except (psutil.Error, OSError):
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
