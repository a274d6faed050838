"""A run's network in MLflow: logged and registered once, loadable without this package, never at the run's cost."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.after.find import find
from syncbn.after.logged import MODEL_FILE, record_model
from syncbn.after.trained import open_run
from syncbn.compose import compose
from syncbn.config import RunConfig
from syncbn.launch.rank import run_rank
from syncbn.registry import REGISTRIES
from syncbn.runtime.base import Solo
from syncbn.tracking import read_journal, shipper
from syncbn.tracking.service import store_uri
from syncbn.tracking.study import ship
from syncbn.train import recorded_run

pytest.importorskip("mlflow", reason="the extra syncbn[service] is not installed")
pytestmark = pytest.mark.untraced
CPU = Solo(torch.device("cpu"))
LOGGED = ("debug=tiny", "tracking.name=mlflow", "tracking.log_model=true", "model.hidden=[8]")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """A store without runs: making one takes MLflow two seconds, copying one nothing."""
    from mlflow.tracking import MlflowClient

    runs = tmp_path_factory.mktemp("store")
    MlflowClient(store_uri(runs)).search_experiments()
    return runs / "mlflow.db"


@pytest.fixture
def folder(tmp_path, monkeypatch, empty_store):
    """The current folder, whose `runs` MLflow reads; a busy machine gets the time it needs at a run's end."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    shutil.copy(empty_store, "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri("runs"))
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr(shipper.Shipper.close, "__defaults__", (120.0,))
    return tmp_path


def logged(*overrides: str) -> RunConfig:
    cfg = compose([*LOGGED, *overrides])
    run_rank(cfg, CPU)
    return cfg


def client():
    from mlflow.tracking import MlflowClient

    return MlflowClient(store_uri("runs"))


def counts(name: str = "runs") -> tuple[int, int]:
    """Models of the experiment `runs`, and versions of the registered model `name`."""
    ids = [client().get_experiment_by_name("runs").experiment_id]
    return len(client().search_logged_models(ids)), len(
        client().search_model_versions(f"name = '{name}'")
    )


def model_records(cfg: RunConfig) -> list[dict]:
    records = read_journal(cfg.folder / "journal.jsonl")
    return [record for record in records if record.get("event") == "model"]


def samples(cfg: RunConfig, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Test inputs, and what the run's own network makes of them."""
    run = open_run(find(str(cfg.folder)))
    x, _ = next(run.sets.test.batches([torch.arange(count)]))
    return x, run.model(x).detach()


def test_a_finished_runs_network_is_registered_once_and_loaded_with_its_outputs(folder):
    import mlflow.pyfunc
    import mlflow.pytorch

    cfg = logged("norm=sync", "train.ema=0.5")
    x, y = samples(cfg)
    torch.testing.assert_close(
        mlflow.pytorch.load_model("models:/runs/1")(x), y, rtol=1e-5, atol=1e-5
    )
    one = mlflow.pyfunc.load_model("models:/runs/1")
    torch.testing.assert_close(
        torch.from_numpy(one.predict(x[:1].numpy())), y[:1], rtol=1e-5, atol=1e-5
    )
    (version,) = client().search_model_versions("name = 'runs'")
    assert client().get_run(version.run_id).info.run_name == cfg.name
    run_rank(cfg, CPU)
    ship(cfg.folder)
    assert counts() == (1, 1)
    logged(
        "norm=sync", "train.ema=0.5", "tracking.model_name=digits"
    )  # the same run, under another name too
    assert (counts(), counts("digits")) == ((1, 1), (1, 1))


def test_a_service_that_fails_at_the_end_gets_the_model_later_and_once(folder, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    def down(*_, **__):
        raise ConnectionError("refused")

    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "create_model_version", down)
        failing.setattr(shipper, "CLOSE_FAILING_S", 0.1)
        cfg = logged()
    assert "files of the run's end are so far in its folder alone" in caplog.text
    assert f"syncbn ship {cfg.folder}" in caplog.text
    for _ in range(2):
        ship(cfg.folder)
        assert counts() == (1, 1)


DYNAMIC = """
from torch import nn
import syncbn.extend as extend

class Fickle(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.LazyLinear(classes)
    def forward(self, x):
        return self.layer(x.flatten(1) if x.sum() > 0 else -x.flatten(1))

@extend.model("fickle")
def fickle(shape, num_classes):
    net = Fickle(num_classes)
    import torch
    net(torch.zeros(2, *shape))
    return net
"""


def test_a_network_that_cannot_be_exported_costs_one_warning(folder, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(folder))
    for registry in REGISTRIES.values():
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    (folder / "fickle.py").write_text(DYNAMIC)
    cfg = compose([*LOGGED[:-1], "extensions=[fickle]", "model=fickle", "norm=none"])
    recorded_run(cfg, CPU)
    with caplog.at_level(logging.WARNING):
        record_model(cfg)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "syncbn.after"]
    assert said.startswith(f"no model of run {cfg.folder} goes to MLflow: UsageError: the Fickle ")
    assert "\n" not in said
    assert model_records(cfg) == []
    sys.modules.pop("fickle")


def test_a_run_begun_anew_records_its_own_network(folder):
    cfg = compose([*LOGGED])
    recorded_run(cfg, CPU)
    record_model(cfg)
    (first,) = model_records(cfg)
    before = (cfg.folder / MODEL_FILE).stat().st_mtime_ns
    record_model(cfg)
    assert (cfg.folder / MODEL_FILE).stat().st_mtime_ns == before
    assert model_records(cfg) == [first]
    again = compose([*LOGGED, "train.resume=false", "optim.lr=0.3"])
    recorded_run(again, CPU)
    assert model_records(again) == []
    record_model(again)
    assert model_records(again)[0]["step"] == 2
    assert (cfg.folder / MODEL_FILE).stat().st_mtime_ns != before


ALONE = """
import sys; sys.modules["syncbn"] = None
import mlflow.pytorch, torch
torch.save(mlflow.pytorch.load_model("models:/runs/1")(torch.load("x.pt")).detach(), "y.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["local", "torchrun", "ray"])
def test_every_launcher_logs_a_model_that_loads_without_this_package(folder, bench, start):
    verb = ["-m", "syncbn", "train", *LOGGED, "norm=sync"]
    ranks = ["launcher.num_workers=2", *(["launcher=ray"] if start == "ray" else [])]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *verb] if start == "torchrun" else [*verb, *ranks]
    done = bench.run(sys.executable, *command, cwd=folder)
    assert done.returncode == 0, done.stderr
    cfg = find("run").config
    ship(Path("runs/run"))
    assert counts() == (1, 1)
    x, y = samples(cfg)
    torch.save(x, "x.pt")
    subprocess.run([sys.executable, "-c", ALONE], check=True)
    torch.testing.assert_close(torch.load("y.pt"), y, rtol=1e-5, atol=1e-5)
