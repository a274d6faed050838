"""Sending a run or a study to a Ray cluster as a job.

Users send a verb and settings, checked here first; the command and the environment are ours. What goes along is said
by `ray_upload`.
"""

import logging
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from syncbn.config import Config, config_hash
from syncbn.errors import ServiceUnreachable, UsageError
from syncbn.launch.plan import has_secrets
from syncbn.launch.ray_dashboard import Dashboard
from syncbn.launch.ray_upload import Upload, runtime_env, too_large
from syncbn.overrides import parse, with_changed_values
from syncbn.provenance import git_revision, versions
from syncbn.tracking.redact import redact_text

HOME_ON_CLUSTER = "${oc.env:HOME}/syncbn-runs"
"""Where files go when `runs_dir` is not given: beside the job's own folder, which Ray throws away."""

ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""A stopped job gets the signal it saves a checkpoint on, and a minute for it."""

_OURS = ("launcher", "launcher.address")


def job_overrides(overrides: Sequence[str], folder: Path) -> list[str]:
    """`overrides` as the job gets them: on Ray, and with paths that do not depend on where they are read.

    Relative paths are taken from `folder`, where the user stands, and must mean the same on the cluster's nodes; `~` is
    the home folder there.

    Raises:
        UsageError: an override that names another launcher, or carries a password or token.
    """
    if has_secrets(overrides):
        raise UsageError(
            "a password or token among the settings would be readable by every user of the cluster: set it in the "
            "cluster's environment, e.g. MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    kept = []
    for override in overrides:
        key = override.partition("=")[0]
        if key in _OURS and override != "launcher=ray":
            raise UsageError(
                f"{override!r} is not allowed on submit: a job runs on its own Ray cluster"
            )
        if key.lstrip("+") in ("runs_dir", "data.root"):
            override = with_changed_values(override, partial(_anchored, folder))
        if key not in _OURS:
            kept.append(override)
    if not any(override.startswith("runs_dir=") for override in kept):
        kept.append(f"runs_dir={HOME_ON_CLUSTER}")
    return [*kept, "launcher=ray", "launcher.address=auto"]


def _anchored(folder: Path, path: str) -> str:
    return path if path.startswith(("~", "${")) else str(folder / path)


def entrypoint(verb: str, overrides: Sequence[str], python: str = "python") -> str:
    """The command that the cluster's head runs, quoted for its shell."""
    return shlex.join([python, "-m", "syncbn", verb, *overrides])


def files(overrides: Sequence[str], name: str) -> str:
    """The folder on the cluster where the job's files go, with `~` for the home folder there."""
    given = next(o for o in reversed(overrides) if o.startswith("runs_dir="))
    runs_dir = str(parse(given).value())
    return f"{runs_dir.replace('${oc.env:HOME}', '~')}/{name}"


def mlflow_variables(cfg: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """MLflow's variables of `environ` that `cfg` was planned with, which the job is to read as well.

    Raises:
        UsageError: an address with a password, or of a file.
    """
    uri, experiment = environ.get("MLFLOW_TRACKING_URI"), environ.get("MLFLOW_EXPERIMENT_NAME")
    found = {}
    if uri and cfg.tracking.uri == uri:
        if uri.startswith("sqlite:") or redact_text(uri) != uri:
            raise UsageError(
                f"MLFLOW_TRACKING_URI={redact_text(uri)} is not sent with a job: it names a file of this machine, or "
                "has a password in it; give tracking.uri, with the login in the cluster's environment"
            )
        found["MLFLOW_TRACKING_URI"] = uri
    if experiment and cfg.tracking.experiment == experiment:
        found["MLFLOW_EXPERIMENT_NAME"] = experiment
    return found


def send(
    dashboard: Dashboard, verb: str, cfg: Config, overrides: Sequence[str], upload: Upload
) -> str:
    """Send the job and return its id. `overrides` are those of `job_overrides`, `cfg` what they compose to.

    Raises:
        UsageError: more goes along with it than the cluster takes.
        ServiceUnreachable: the cluster did not take it.
    """
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # either would silently take the place of the address asked for
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.WARNING)  # the client warns of each file it leaves out
    environment = (
        ENVIRONMENT
        | mlflow_variables(cfg, os.environ)
        | {
            "SYNCBN_REVISION": git_revision(),
            "SYNCBN_VERSION": versions().get("syncbn", ""),
        }
    )
    headers = {"Authorization": f"Bearer {dashboard.token}"}
    try:
        client = JobSubmissionClient(dashboard.address, headers=headers)
        with runtime_env(upload) as sent:
            return client.submit_job(
                submission_id=f"{verb}-{cfg.name}-{secrets.token_hex(3)}",
                entrypoint=entrypoint(verb, overrides, dashboard.python()),
                runtime_env=sent | {"env_vars": environment},
                metadata={"verb": verb, "name": cfg.name, "config_hash": config_hash(cfg)},
            )
    except (RuntimeError, ConnectionError, OSError) as error:
        if "status code 413" in str(error):
            raise too_large(upload, dashboard.address) from error
        raise ServiceUnreachable(f"{dashboard.address} did not take the job: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
