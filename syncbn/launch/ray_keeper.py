"""Leaves nothing of a cluster of a launch's own behind, however that launch ends.

A program by itself: `python ray_keeper.py FOLDER`, whose standard input the launch holds open. When the launch is gone,
Ray's servers would wait a minute for it, and leave their folder. Run by its path, it imports nothing of the package.
"""

import contextlib
import shutil
import sys

import psutil

MARK = "SYNCBN_CLUSTER"
"""The variable that all processes of a cluster inherit, with the cluster's folder; a parent may be gone."""


def main(folder: str) -> None:
    """Wait for the end of the input, then end all processes of the cluster in `folder`, and remove it."""
    sys.stdin.read()
    end_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


def end_all(folder: str) -> None:
    """Kill every process of the cluster in `folder`, also those that are started meanwhile."""
    while processes := cluster_in(folder):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=1.0)


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
    main(sys.argv[1])
