"""What the verbs that talk to a Ray cluster share: entering it, asking for room, waiting for a job."""

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from syncbn.launch.plan import Plan
from syncbn.launch.ray_access import read_token, require_capacity
from syncbn.launch.ray_dashboard import TERMINAL, Dashboard, require_same_ray, require_token_mode

POLL_S = 1.0


def enter(address: str, token_file: Path | None) -> Dashboard:
    """The dashboard at `address`, once it is known to live, to ask for a token, and to take ours.

    Raises:
        ServiceUnreachable: no Ray dashboard answers.
        NotAuthorised: it accepts callers without a token, or refuses our token, or we have none.
        UsageError: not a dashboard's URL, or a cluster of another Ray version.
    """
    address = address.rstrip("/")
    require_token_mode(address)
    dashboard = Dashboard(address, read_token(os.environ, token_file))
    require_same_ray(dashboard, version("ray"))
    return dashboard


def require_room(dashboard: Dashboard, plan: Plan) -> None:
    """Raise `UsageError` where the cluster has not the CPUs or GPUs that `plan` needs."""
    where = f"the cluster at {dashboard.address}"
    require_capacity(plan.config, plan.num_ranks, dashboard.resources(), where)


def wait_for(
    dashboard: Dashboard, job_id: str, meanwhile: Callable[[], object] | None = None
) -> dict[str, Any]:
    """The job's last state, once it is over; calls `meanwhile` every second, and once more afterwards."""
    while True:
        job = dashboard.job(job_id)
        if meanwhile is not None:
            meanwhile()
        if job["status"] in TERMINAL:
            return job
        time.sleep(POLL_S)


def follow_logs(
    dashboard: Dashboard, job_id: str, write: Callable[[str], object]
) -> dict[str, Any]:
    """Pass on what the job writes until it is over, its last line included; return its last state."""
    written = 0

    def pass_on() -> None:
        nonlocal written
        text = dashboard.logs(job_id)
        write(text[written:])
        written = len(text)

    return wait_for(dashboard, job_id, pass_on)
