"""Where MLflow is, whether it answers, and how its client is to behave here.

MLflow is tested with the standard library alone, because importing mlflow takes three seconds and a wrong address or a
missing password should be said at once, before any rank starts.
"""

import base64
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from syncbn.checks import SQLITE, TRACKING_URIS, is_tracking_uri
from syncbn.config import RunConfig
from syncbn.errors import NotAuthorised, ServiceUnreachable, SyncbnError, UsageError
from syncbn.tracking.proxy import proxy_hint
from syncbn.tracking.redact import redact_text

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A call may hang for this long and no longer; the shipper has a back-off of its own, and two
    # nested ones would multiply.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
"""Set before mlflow is imported, where the user has not set them."""


def store_uri(runs_dir: str | Path) -> str:
    """The sqlite store in `runs_dir`, as an absolute URI: workers may have another current folder."""
    return f"{SQLITE}{Path(runs_dir).resolve() / 'mlflow.db'}"


def tracking_uri(cfg: RunConfig) -> str:
    """The URI that `tracking.uri` names, a sqlite path made absolute; else the store in `runs_dir`."""
    uri = cfg.tracking.uri
    if uri is None:
        return store_uri(cfg.runs_dir)
    return f"{SQLITE}{sqlite_path(uri).resolve()}" if uri.startswith(SQLITE) else uri


def sqlite_path(uri: str) -> Path:
    """The file that a `sqlite:///` URI names."""
    return Path(uri.removeprefix(SQLITE))


def probe(uri: str, timeout_s: float = 5.0) -> None:
    """Return when the tracking service at `uri` can be used; decide within `timeout_s` seconds.

    Raises:
        UsageError: not a sqlite, http or https URI.
        ServiceUnreachable: refused, unknown host, no answer in time, no MLflow there, or a folder that cannot be
            written.
        NotAuthorised: it asks for another user (401) or forbids this one (403).
    """
    if not is_tracking_uri(uri):
        raise UsageError(f"tracking.uri={redact_text(uri)!r} is not allowed: {TRACKING_URIS}")
    if uri.startswith(SQLITE):
        _probe_file(sqlite_path(uri))
    else:
        _within(timeout_s, lambda: _probe_server(uri, timeout_s), redact_text(uri))


def _probe_file(path: Path) -> None:
    """Raise `ServiceUnreachable` unless `path` is an sqlite file that can be written, or can become one."""
    if path.is_file() and path.stat().st_size and not _is_sqlite(path):
        raise ServiceUnreachable(f"tracking.uri names {path}, which is not an sqlite database")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ServiceUnreachable(f"the MLflow store {path} cannot be written in {folder}")


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15) == b"SQLite format 3"


def _probe_server(uri: str, timeout_s: float) -> None:
    """Ask for one experiment: unlike `/health`, that needs the same rights and the same host name as writing."""
    parts = urlsplit(uri)
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        f"{address.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json"} | authorisation(uri),
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise _refusal(error, redact_text(uri)) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ServiceUnreachable(
            f"no MLflow server at {redact_text(uri)}: {reason}{proxy_hint(uri)}"
        ) from error


def _refusal(error: urllib.error.HTTPError, where: str) -> SyncbnError:
    """What an HTTP status other than 200 means."""
    said = " ".join(error.read(200).decode(errors="replace").split())
    if error.code in (401, 403):
        return NotAuthorised(
            f"the MLflow server at {where} refuses this user ({error.code}: {said}): set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return ServiceUnreachable(
        f"no working MLflow server at {where}: it answers {error.code}: {said}{proxy_hint(where)}"
    )


def authorisation(uri: str) -> dict[str, str]:
    """The header that MLflow's own client would send: from the environment, or from the URI's user-info."""
    parts = urlsplit(uri)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", parts.username)
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", parts.password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {
            "Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        }
    return {"Authorization": f"Bearer {token}"} if token else {}


def _within(timeout_s: float, ask: Callable[[], None], where: str) -> None:
    """Run `ask` for at most `timeout_s` seconds, looking up a host name and a dripping answer included."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="syncbn-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise ServiceUnreachable(
            f"no answer from the MLflow server at {where} in {timeout_s:g} s{proxy_hint(where)}"
        )
    if outcome[0] is not None:
        raise outcome[0]
