"""Every option of every config group trains two steps and is measured."""

from pathlib import Path

import pytest
import torch
from fake_data import write_cifar10, write_images, write_mnist

from syncbn.compose import compose, config_folder, vary
from syncbn.config import RunConfig
from syncbn.errors import UsageError
from syncbn.runtime import Solo
from syncbn.train import RunSummary, recorded_run


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _two_steps(folder: Path, *overrides: str) -> RunSummary:
    cfg = compose(["debug=tiny", f"runs_dir={folder}", *overrides])
    return recorded_run(cfg, Solo(torch.device("cpu")))


@pytest.mark.parametrize("model", _options("model"))
def test_every_model(model, tmp_path):
    images = ["data=synthetic", "data.num_samples=16"] if model != "mlp" else []
    archs = {"torchvision": "mobilenet_v2", "timm": "resnet10t"}
    arch = [f"model.arch={archs[model]}"] if model in archs else []
    assert _two_steps(tmp_path, f"model={model}", *images, *arch).steps == 2


@pytest.mark.parametrize("data", _options("data"))
def test_every_data_set(data, tmp_path, monkeypatch):
    if data == "image_folder":
        write_images(tmp_path / "data")
    elif data == "cifar10":
        write_cifar10(tmp_path / "data", monkeypatch)
    elif data in ("mnist", "fashion_mnist"):
        write_mnist(tmp_path / "data", "MNIST" if data == "mnist" else "FashionMNIST")
    root = f"data.root={tmp_path / 'data'}"
    small = ["data.image_size=16"] if data == "image_folder" else []
    assert _two_steps(tmp_path, f"data={data}", root, *small).steps == 2


@pytest.mark.parametrize("optim", _options("optim"))
def test_every_optimiser(optim, tmp_path):
    assert _two_steps(tmp_path, f"optim={optim}").steps == 2


@pytest.mark.parametrize("norm", [name for name in _options("norm") if name != "sync_group"])
def test_every_arm(norm, tmp_path):
    if norm == "torch_sync" and not torch.cuda.is_available():
        with pytest.raises(UsageError, match="CUDA"):
            _two_steps(tmp_path, "norm=torch_sync")
    else:
        assert _two_steps(tmp_path, f"norm={norm}").steps == 2


def test_groups_of_one(tmp_path):
    assert _two_steps(tmp_path, "norm=sync_group", "norm.group_size=1").steps == 2


@pytest.mark.slow_if(lambda study: study.startswith("batch_size_"))  # batch_size on other data
@pytest.mark.parametrize("study", _options("study"))
def test_every_arm_of_every_study(study, tmp_path):
    """On the embedded digits; arms on several ranks as virtual ones, which some probes refuse."""
    colour = compose([f"study={study}"]).model.name == "torchvision"
    data = ["data.num_samples=64"] if colour else ["data=digits", "data.limit=256"]
    looks = ["probe.samples=16", "probe.every=1", "train.eval_every=0"]
    cfg = compose([f"study={study}", f"runs_dir={tmp_path}", "tracking=journal", *data, *looks])
    assert cfg.study is not None
    for arm, overrides in cfg.study.arms.items():
        run = vary(cfg, [*overrides, "train.steps=2", f"name={arm}"])
        if run.num_ranks > 1:
            run = vary(cfg, [*overrides, "train.steps=2", f"name={arm}", *_VIRTUALLY])
        assert isinstance(run, RunConfig)
        assert recorded_run(run, Solo(torch.device("cpu"))).steps == 2


_VIRTUALLY = ("train.virtual=true", "probe.names=[]")
