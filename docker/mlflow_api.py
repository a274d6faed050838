"""MLflow's REST interface as its admin, for the scripts of the image.

The standard library alone: importing mlflow takes three seconds, and a health check runs every thirty.
"""

import base64
import json
import os
import urllib.request
from pathlib import Path
from typing import Any


def secret(name: str) -> str:
    """The content of the secret `name`, a file in SYNCBN_SECRETS."""
    return (Path(os.environ.get("SYNCBN_SECRETS", "/run/secrets")) / name).read_text().strip()


def call(method: str, path: str, body: dict[str, Any] | bytes | None = None) -> bytes:
    """The answer of the server at MLFLOW_URL (this container's own by default) to a request as its admin.

    Raises:
        urllib.error.HTTPError: it refused; `code` is the HTTP status.
        OSError: it does not answer.
    """
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD") or secret("mlflow_admin_password")
    login = base64.b64encode(f"admin:{password}".encode()).decode()
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(  # noqa: S310 - the address is ours
        os.environ.get("MLFLOW_URL", "http://127.0.0.1:5000") + path,
        data=data,
        method=method,
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=8) as answer:  # noqa: S310
        return answer.read()
