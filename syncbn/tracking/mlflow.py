"""The MLflow sink: the only file that imports mlflow, and therefore imported only in the writer thread.

The decision: `MlflowClient` with explicit run ids throughout. The fluent API keeps an active run per thread and
ends it as FINISHED at exit, also when the process was killed.
"""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import (
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from syncbn.checks import SQLITE
from syncbn.tracking.service import sqlite_path
from syncbn.tracking.shipper import log, one_line
from syncbn.tracking.source import RemoteRun, RunGone, RunKey
from syncbn.tracking.update import ModelFile, Update

METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100
JOURNAL_TAG = "syncbn.journal"
ENDED = ("FINISHED", "FAILED", "KILLED")


class MlflowSink:
    """An MLflow tracking store or server at `uri`."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._client = MlflowClient(uri)
        self._experiments: dict[str, str] = {}

    def open(self, key: RunKey, tags: Mapping[str, str]) -> RemoteRun:
        """The run whose journal tag is `key.journal_id`, hung under `key.parent_id`; made where there is none."""
        experiment_id = self._experiment(key.experiment)
        run = self._find(experiment_id, key.journal_id)
        parent = {"mlflow.parentRunId": key.parent_id} if key.parent_id else {}
        if run is None:
            tags = {**tags, **parent, JOURNAL_TAG: key.journal_id}
            run = self._client.create_run(experiment_id, key.began_ms, tags, key.name)
        elif key.parent_id and run.data.tags.get("mlflow.parentRunId") != key.parent_id:
            self._client.set_tag(run.info.run_id, "mlflow.parentRunId", key.parent_id)
        return RemoteRun(
            run_id=run.info.run_id,
            last_steps=self._last_steps(run),
            has_params=bool(run.data.params),
            ended=run.info.status in ENDED,
        )

    def send(self, run_id: str, update: Update) -> None:
        """Params, tags and points in batches of what MLflow takes, then the status."""
        params = [Param(allowed(key), text) for key, text in update.params.items()]
        tags = [RunTag(allowed(key), text) for key, text in update.tags.items()]
        points = [Metric(allowed(p.key), p.value, p.time_ms, p.step) for p in update.points]
        for batch in in_batches(params, PARAMS_AT_ONCE):
            self._log(run_id, params=batch)
        for batch in in_batches(tags, PARAMS_AT_ONCE):
            self._log(run_id, tags=batch)
        for batch in in_batches(points, METRICS_AT_ONCE):
            self._log(run_id, metrics=batch)
        if update.status in ENDED:
            self._client.set_terminated(run_id, update.status, update.time_ms)
        elif update.status is not None:
            self._client.update_run(run_id, status=update.status)

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        """Copy `file` into the run's artifacts, over an earlier copy."""
        self._client.log_artifact(run_id, str(file), folder)

    def log_model(self, run_id: str, file: Path, model: ModelFile) -> None:
        """Log `file` as a model of the run, and register it as `model.registered`, each unless a former call has.

        The file is what MLflow's own `serialization_format="pt2"` writes. It is copied as it was checked: exporting
        here again, in a thread, could not be cut short at the end of the process.
        """
        versions = self._client.search_model_versions(f"run_id = '{run_id}'")
        if any(version.name == model.registered for version in versions):
            return
        logged = self._logged_model(run_id, file, model)
        try:
            self._client.create_registered_model(model.registered)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Not "models:/<id>", which a store in a file looks up at the process's global tracking URI.
        place = logged.artifact_location
        self._client.create_model_version(model.registered, place, run_id, model_id=logged.model_id)

    def _logged_model(self, run_id: str, file: Path, model: ModelFile) -> LoggedModel:
        """The run's model, made and uploaded as far as a former call has not."""
        experiment_id = self._client.get_run(run_id).info.experiment_id
        where = f"source_run_id = '{run_id}'"
        found = next(iter(self._client.search_logged_models([experiment_id], where)), None)
        if found is None:
            found = self._client.create_logged_model(experiment_id, "model", run_id)
            output = LoggedModelOutput(found.model_id, model.step)
            self._client.log_outputs(run_id, [output])
        if found.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory(prefix="syncbn-model-") as folder:
                described = Model(run_id=run_id, model_uuid=found.model_id, model_id=found.model_id)
                save(Path(folder), file, model, described)
                self._client.log_model_artifacts(found.model_id, f"{folder}/model")
            self._client.finalize_logged_model(found.model_id, LoggedModelStatus.READY)
        return found

    def abandon(self, experiment: str, journal_id: str) -> None:
        """Mark the run of `journal_id`, and its children, as KILLED where they still count as running."""
        experiment_id = self._experiment(experiment)
        run = self._find(experiment_id, journal_id)
        if run is None:
            return
        where = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
        for each in [run, *self._client.search_runs([experiment_id], where)]:
            if each.info.status not in ENDED:
                self._client.set_terminated(each.info.run_id, "KILLED")

    def _log(self, run_id: str, **batch: Any) -> None:
        """Send one batch; what MLflow will never take is named in the log and left, lest it hold up the rest."""
        try:
            self._client.log_batch(run_id, **batch)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGone(run_id) from error
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            log.warning(
                "MLflow refuses some %s of run %s: %s", "".join(batch), run_id, one_line(error)
            )

    def _find(self, experiment_id: str, journal_id: str) -> Run | None:
        where = f"tags.`{JOURNAL_TAG}` = '{journal_id}'"
        return next(iter(self._client.search_runs([experiment_id], where, max_results=1)), None)

    def _last_steps(self, run: Run) -> dict[str, int]:
        history = self._client.get_metric_history
        return {
            key: max(point.step for point in history(run.info.run_id, key))
            for key in run.data.metrics
        }

    def _experiment(self, name: str) -> str:
        """The id of the experiment `name`, made (or taken back from the deleted ones) where it is missing."""
        if name not in self._experiments:
            known = self._client.get_experiment_by_name(name) or self._create(name)
            if known.lifecycle_stage == "deleted":
                self._client.restore_experiment(known.experiment_id)
            self._experiments[name] = known.experiment_id
        return self._experiments[name]

    def _create(self, name: str) -> Any:
        """A new experiment; beside an sqlite store its artifacts go to the folder `mlartifacts`."""
        place = None
        if self._uri.startswith(SQLITE):
            place = str(sqlite_path(self._uri).parent / "mlartifacts" / name)
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return self._client.get_experiment(self._client.create_experiment(name, place, tags))
        except MlflowException:
            # Another process may have made it in between.
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return found


def save(folder: Path, file: Path, model: ModelFile, described: Model) -> None:
    """Write `file` as a model in MLflow's format, with the flavors pytorch and python_function, to `folder`/model."""
    data = folder / "pt2"
    data.mkdir()
    shutil.copy(file, data / "model.pt2")
    dtype = np.dtype(model.dtype)
    described.signature = ModelSignature(
        Schema([TensorSpec(dtype, (-1, *model.input))]),
        Schema([TensorSpec(dtype, (-1, *model.output))]),
    )
    described.add_flavor("pytorch", model_data="data/pt2", pytorch_version=model.torch, code=None)
    save_model(
        folder / "model",
        loader_module="mlflow.pytorch",
        data_path=str(data),
        mlflow_model=described,
        model_config={"device": "cpu"},  # the graph's, also where there is a GPU
        pip_requirements=[f"torch=={model.torch.partition('+')[0]}"],
    )


def allowed(key: str) -> str:
    """`key` with what MLflow does not allow in a name replaced by `_`, and no longer than its 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:250]


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in runs of at most `size`; nothing for no items."""
    starts: Iterable[int] = range(0, len(items), size)
    return (items[start : start + size] for start in starts)
