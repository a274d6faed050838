"""A running Ray cluster by its dashboard: whether it wants a token, what it has, its jobs and their logs.

Plain HTTP with short timeouts rather than Ray's client, which has none and takes a second to import; only sending a
job needs the client (`ray_jobs`). The first request is made without the token: a cluster that accepts it
runs anyone's code, and is refused.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from syncbn.errors import NotAuthorised, ServiceUnreachable, UsageError
from syncbn.tracking.proxy import proxy_hint

TIMEOUT_S = 5.0
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
"""States that a job does not leave."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard at `address` (http://host:port), entered with `token`."""

    address: str
    token: str

    def ask(self, path: str, method: str = "GET") -> Any:
        """The JSON that the dashboard answers at `path`.

        Raises:
            ServiceUnreachable: nothing answers, or not as Ray does.
            NotAuthorised: the token is refused.
            UsageError: there is no such thing (404).
        """
        status, body = _request(self.address + path, method, self.token)
        if status in (401, 403):
            raise NotAuthorised(f"the cluster at {self.address} refuses this token (HTTP {status})")
        if status == 404:
            raise UsageError(f"{body.strip()}; see `syncbn jobs`")
        if status != 200:
            raise ServiceUnreachable(f"{self.address}{path} answered HTTP {status}: {body[-200:]}")
        return _parsed(self.address, body)

    def nodes(self) -> list[dict[str, Any]]:
        """The live nodes: `node_id`, `is_head_node`, `resources_total`."""
        nodes = self.ask("/api/v0/nodes?limit=10000")["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def resources(self) -> Mapping[str, float]:
        """What the live nodes have together, e.g. {"CPU": 8.0, "GPU": 2.0}."""
        total: Counter[str] = Counter()
        for node in self.nodes():
            total.update(node["resources_total"])
        return total

    def python(self) -> str:
        """The interpreter that Ray runs with on the head, or `python` where it does not say.

        The head may have been started from an environment that is not on its PATH.
        """
        heads = [node["node_id"] for node in self.nodes() if node["is_head_node"]]
        detail = self.ask(f"/nodes/{heads[0]}")["data"]["detail"] if heads else {}
        commands = " ".join(detail.get("cmdline") or [])
        found = re.search(r"--python_worker_command=(\S+)", commands)
        return found.group(1) if found else "python"

    def jobs(self) -> list[dict[str, Any]]:
        """Submitted jobs, oldest first."""
        jobs = [job for job in self.ask("/api/jobs/") if job["type"] == "SUBMISSION"]
        return sorted(jobs, key=lambda job: job["start_time"] or 0)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job: `status`, `entrypoint`, `driver_exit_code`, `message`, times in ms."""
        return self.ask(f"/api/jobs/{quote(job_id, safe='')}")

    def logs(self, job_id: str) -> str:
        """Everything the job has written so far."""
        return self.ask(f"/api/jobs/{quote(job_id, safe='')}/logs")["logs"]

    def stop(self, job_id: str) -> None:
        """Ask the job to stop; it has a minute to save."""
        self.ask(f"/api/jobs/{quote(job_id, safe='')}/stop", "POST")


def require_token_mode(address: str) -> None:
    """Knock at the dashboard at `address` without a token.

    Raises:
        UsageError: not an http(s) URL of a host.
        ServiceUnreachable: nothing answers, or not as Ray does.
        NotAuthorised: it accepts callers without a token.
    """
    require_url(address)
    status, body = _request(address + "/api/version", "GET", None)
    if status in (401, 403):
        return
    if status != 200 or "ray_version" not in _parsed(address, body):
        raise ServiceUnreachable(
            f"what answers at {address} is no Ray dashboard (HTTP {status}){proxy_hint(address)}"
        )
    raise NotAuthorised(
        f"the cluster at {address} answers without a token, so anyone who can connect can run code there: "
        "start it with RAY_AUTH_MODE=token"
    )


def require_same_ray(dashboard: Dashboard, own_version: str) -> None:
    """Raise `UsageError` where the cluster runs another minor version of Ray than `own_version`."""
    theirs = dashboard.ask("/api/version")["ray_version"]
    if theirs.split(".")[:2] != own_version.split(".")[:2]:
        raise UsageError(
            f"the cluster at {dashboard.address} runs Ray {theirs}, this is {own_version}"
        )


def exit_code_of(job: Mapping[str, Any]) -> int:
    """The exit code that a job's state stands for: 0 while it runs or once it succeeded, its own where it failed."""
    if job["status"] == "STOPPED":
        return 130
    return (job.get("driver_exit_code") or 1) if job["status"] == "FAILED" else 0


def require_url(address: str) -> None:
    """Raise `UsageError` unless `address` is the URL of a dashboard, without a login or a path."""
    try:
        url = urlsplit(address)
        known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        known = False
    if not known or "@" in address or url.path or url.query:
        raise UsageError(
            f"--address {address!r} is not allowed: the dashboard's URL, http://host:8265 or https://host"
        )


def _request(url: str, method: str, token: str | None) -> tuple[int, str]:
    """Status and body of one request."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310  checked to be http(s)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except HTTPException as error:  # BadStatusLine has what was answered, in bytes for programs
        raise ServiceUnreachable(
            f"what answers at {url} speaks no HTTP: give the dashboard's port (8265 by default), not the port that "
            "nodes connect to (6379)"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServiceUnreachable(
            f"no Ray dashboard answers at {url}: {reason}{proxy_hint(url) or _ray_address_hint()}"
        ) from error


def _ray_address_hint() -> str:
    """That Ray's own variables are not read, where one is set."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if os.environ.get(name):
            return (
                f" ({name}={os.environ[name]} is not read: the dashboard's address is --address or SYNCBN_ADDRESS, "
                "http://host:8265)"
            )
    return ""


def _parsed(address: str, body: str) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise ServiceUnreachable(
            f"what answers at {address} is no Ray dashboard{proxy_hint(address)}"
        ) from None
