"""Whether this container does its work: exit code 0, or 1 and one line that says what does not.

python health.py [ROLE]     the role is the container's own where none is given

MLflow's `/health` answers also where its disk is full or its login broken, and Ray's where it asks nobody for a token.
So the server must store and return a value and a file, and the cluster must refuse a caller without its token.
"""

import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

from mlflow_api import call

PLACE = "health-check"
"""Experiment and artifact folder that the check writes to."""


def mlflow() -> None:
    """Write a tag and a file through the server, and read both back."""
    stamp = str(time.time_ns())
    experiment = _experiment()
    tag = {"experiment_id": experiment, "key": "checked", "value": stamp}
    call("POST", "/api/2.0/mlflow/experiments/set-experiment-tag", tag)
    found = json.loads(call("GET", f"/api/2.0/mlflow/experiments/get?experiment_id={experiment}"))
    if {"key": "checked", "value": stamp} not in found["experiment"].get("tags", []):
        raise RuntimeError("the tracking server forgot what it was told")
    file = f"/api/2.0/mlflow-artifacts/artifacts/{PLACE}/checked"
    call("PUT", file, stamp.encode())
    if call("GET", file) != stamp.encode():
        raise RuntimeError("the tracking server returned another file than it was given")


def _experiment() -> str:
    """Id of the check's own experiment, made where it is missing."""
    try:
        path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(PLACE)}"
        return json.loads(call("GET", path))["experiment"]["experiment_id"]
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    return json.loads(call("POST", "/api/2.0/mlflow/experiments/create", {"name": PLACE}))[
        "experiment_id"
    ]


def ray_head() -> None:
    """The cluster's store answers, and the Jobs interface refuses who has no token."""
    _expect("http://127.0.0.1:8265/api/gcs_healthz", 200)
    _expect("http://127.0.0.1:8265/api/jobs/", 401)


def ray_worker() -> None:
    """This node's scheduler lives and has joined the cluster."""
    _expect("http://127.0.0.1:52365/api/local_raylet_healthz", 200)


def _expect(url: str, status: int) -> None:
    try:
        with urllib.request.urlopen(url, timeout=8) as answer:  # noqa: S310 - our own address
            found = answer.status
    except urllib.error.HTTPError as error:
        found = error.code
    if found != status:
        raise RuntimeError(f"{url} answers {found} without a token, {status} is right")


CHECKS = {"mlflow": mlflow, "ray-head": ray_head, "ray-worker": ray_worker}
"""Other roles serve no requests: they are healthy as long as they run."""


def main() -> int:
    """Run the role's check; the exit code."""
    role = sys.argv[1] if len(sys.argv) > 1 else _own_role()
    try:
        CHECKS.get(role, lambda: None)()
    except Exception as error:
        sys.stderr.write(f"{role} is not well: {error}\n")
        return 1
    return 0


def _own_role() -> str:
    """The role that the container was started in, as its entrypoint wrote it down."""
    return (Path(tempfile.gettempdir()) / "role").read_text().strip()


if __name__ == "__main__":
    sys.exit(main())
