"""Opens the way to MLflow: sets what its client reads from the environment, then imports it."""

import os

from syncbn.tracking.service import ENVIRONMENT
from syncbn.tracking.source import Sink


def connect(uri: str) -> Sink:
    """A sink for the tracking service at `uri`; takes seconds, most of them importing mlflow."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from syncbn.tracking.mlflow import MlflowSink

    return MlflowSink(uri)
