"""How Ray is reached: address, token, environment, room. Imports nothing of Ray.

Ray reads its settings when it is imported, token mode among them, so they must stand before that; and a bad address or
a missing token is answered without waiting for the import.
"""

import functools
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from syncbn.config import RunConfig
from syncbn.errors import NotAuthorised, UsageError
from syncbn.tracking.redact import redact_text

log = logging.getLogger("syncbn")

SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Token mode always; no outbound calls; a worker without a GPU sees those of its machine as we do."""


def prepare_environment(cfg: RunConfig) -> str | None:
    """Set this process up for Ray; return the `host:port` of the cluster to join, or None for one of our own.

    Raises:
        UsageError: `launcher.address` is neither `host:port` nor `auto`.
        NotAuthorised: there is no token for the cluster to join.
    """
    os.environ.update(SETTINGS)
    address = cluster_address(cfg.launcher.address, os.environ)
    if address is None:
        if "RAY_ADDRESS" in os.environ:
            log.warning(
                "RAY_ADDRESS=%s is set and not used: a cluster of its own is started; "
                "launcher.address=auto joins that one",
                redact_text(os.environ["RAY_ADDRESS"]),
            )
        prepare_own()
    else:
        os.environ["RAY_AUTH_TOKEN"] = read_token(os.environ)
    return address


def prepare_own() -> None:
    """Set this process up for a cluster of its own, with a random token that only it and its children know."""
    os.environ.update(SETTINGS)
    os.environ["RAY_AUTH_TOKEN"] = _own_token()
    os.environ.pop("RAY_ADDRESS", None)


@functools.cache
def _own_token() -> str:
    return secrets.token_hex(32)


def cluster_address(address: str | None, environ: Mapping[str, str]) -> str | None:
    """`launcher.address` as `host:port`; `auto` is RAY_ADDRESS, which a Ray job has, or this machine's port 6379.

    Raises:
        UsageError: an address of another kind.
    """
    if address is None:
        return None
    if address == "auto":
        address = environ.get("RAY_ADDRESS", "127.0.0.1:6379")
    host, _, port = address.rpartition(":")
    if (
        "://" in address
        or "@" in address
        or not host
        or not port.isdigit()
        or not 0 < int(port) < 65536
    ):
        raise UsageError(
            f"launcher.address={address!r} is not allowed: host:port of a cluster's head (6379 by default), or auto; "
            "to send a run to http://host:8265 use `syncbn submit`"
        )
    return address


def require_capacity(
    cfg: RunConfig, num_ranks: int, available: Mapping[str, float], where: str
) -> None:
    """Raise `UsageError` naming the resource of which `available` has too little for `num_ranks` at once."""
    launcher = cfg.launcher
    for resource, key, each in (
        ("CPU", "cpus_per_worker", launcher.cpus_per_worker),
        ("GPU", "gpus_per_worker", launcher.gpus_per_worker),
    ):
        needed = num_ranks * each
        if needed > available.get(resource, 0):
            raise UsageError(
                f"launcher.num_workers={num_ranks} x launcher.{key}={each} needs {needed} {resource}s; "
                f"{where} has {available.get(resource, 0):g}"
            )


def read_token(environ: Mapping[str, str], token_file: Path | None = None) -> str:
    """The token from `token_file`, RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token.

    Raises:
        NotAuthorised: there is none, or its file cannot be read or is empty.
    """
    if token_file is None and environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    path = token_file or _usual_file(environ)
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        raise NotAuthorised(
            "no token for the Ray cluster: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"
        ) from None
    except OSError as error:
        raise NotAuthorised(f"cannot read the Ray token in {path}: {error.strerror}") from error
    if not token:
        raise NotAuthorised(f"the Ray token in {path} is empty")
    return token


def _usual_file(environ: Mapping[str, str]) -> Path:
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path(environ.get("HOME", "/")) / ".ray" / "auth_token"
