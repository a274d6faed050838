"""One job at a time in a run folder.

The lock is the kernel's (`flock`), not the file's existence: it goes with the process that holds it, however that
dies, so the file that stays behind blocks nobody and nothing has to be cleaned up.
"""

import fcntl
import os
import socket
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Self

from syncbn.errors import CheckpointError

LOCK = ".lock"


class FolderInUse(CheckpointError):
    """Another job holds the folder."""


class RunLock:
    """A context manager that holds `folder` (made where it is missing) for this process.

    Raises:
        FolderInUse: on entry, another job holds the folder.
        CheckpointError: on entry, it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIOWrapper | None = None

    def __enter__(self) -> Self:
        path = self.folder / LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            file.close()
            raise FolderInUse(
                f"{self.folder} is in use by {holder}: one job a run folder; give this one another name"
            ) from error
        _sign(file)
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _holder(file: TextIOWrapper) -> str:
    file.seek(0)
    return file.read(200).strip() or "another job"


def _sign(file: TextIOWrapper) -> None:
    """Write down who holds the lock, for the message of a second process."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
