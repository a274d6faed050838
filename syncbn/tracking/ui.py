"""MLflow's web pages over the store of a runs folder.

The process becomes `mlflow server` itself, with one worker and without its job runner: the fewest processes it can do
with, which end with the terminal that started them.
"""

import os
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from syncbn.errors import UsageError
from syncbn.tracking.service import ENVIRONMENT, sqlite_path, store_uri

MODEL_TRAINING = "workflowType=machine_learning"
"""Part of every address: without it MLflow opens its pages for language models, which hide runs."""


def serve_ui(runs_dir: str | Path, port: int = 5000, host: str = "127.0.0.1") -> NoReturn:
    """Print the address, then serve MLflow's pages for the store in `runs_dir` until stopped.

    Raises:
        UsageError: there is no store yet, or the port is taken or not allowed.
    """
    command = ui_command(runs_dir, port, host)
    sys.stdout.write(f"MLflow shows {Path(runs_dir).resolve()} in a few seconds; Ctrl-C ends it.\n")
    for name, page in pages(runs_dir).items():
        sys.stdout.write(f"  {name}: http://{host}:{port}/{page}\n")
    sys.stdout.write("Choose 'Model training' there at the top left, once in a browser.\n")
    sys.stdout.flush()
    settings = ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    os.execve(command[0], command, settings | os.environ)  # noqa: S606 - a list of our own


def ui_command(runs_dir: str | Path, port: int, host: str) -> list[str]:
    """The server's command line; raises `UsageError` where it could not run."""
    uri = store_uri(runs_dir)
    if not sqlite_path(uri).is_file():
        raise UsageError(
            f"no MLflow store in {Path(runs_dir).resolve()}: train or compare something first, or name "
            "another folder with runs_dir"
        )
    refuse_taken(port, host)
    artifacts = sqlite_path(uri).parent / "mlartifacts"
    return [
        sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1",
        "--backend-store-uri", uri, "--artifacts-destination", str(artifacts),
    ]  # fmt: skip


def pages(runs_dir: str | Path) -> dict[str, str]:
    """Name and page of each experiment in the store of `runs_dir`, the latest first, and of all together.

    Raises:
        UsageError: the store is not one of MLflow's.
    """
    path = sqlite_path(store_uri(runs_dir))
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as store:
            rows = store.execute(
                "SELECT experiment_id, name FROM experiments"
                " WHERE lifecycle_stage = 'active' AND name != 'Default' ORDER BY creation_time DESC"
            ).fetchall()
    except sqlite3.Error as error:
        raise UsageError(f"{path} is not a store of MLflow: {error}") from error
    links = {name: f"#/experiments/{number}/runs?{MODEL_TRAINING}" for number, name in rows}
    return links | {"all experiments": f"#/experiments?{MODEL_TRAINING}"}


def refuse_taken(port: int, host: str) -> None:
    """Raise `UsageError` where nothing can listen on `host`:`port`."""
    if not 1 <= port <= 65535:
        raise UsageError(f"port={port} is not allowed: 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} ({error.strerror}): name another port"
            ) from error
