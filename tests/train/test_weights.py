"""Runs that start from given weights: what is loaded, left out and refused, and that the content is part of the run."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from syncbn.checkpoint import load_latest
from syncbn.compose import compose, vary
from syncbn.config import config_hash
from syncbn.errors import CheckpointError, SyncbnError, UsageError, exit_code
from syncbn.models import build_model
from syncbn.runtime import Solo
from syncbn.tracking import read_journal
from syncbn.train import recorded_run
from syncbn.train.state import build
from syncbn.train.weights import Report, fit, output_layer

SOLO = Solo(torch.device("cpu"))
TINY = ["model.hidden=[8]", "data.limit=64", "train.per_rank_batch=16", "train.steps=4"]
PLAIN = compose([*TINY, "name=tuned"])
OTHER = ["data=synthetic", "data.channels=1", "data.image_size=8", "data.num_classes=4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a finished run `base`."""
    folder = tmp_path_factory.mktemp("finished")
    recorded_run(compose([*TINY, "name=base", f"runs_dir={folder}"]), SOLO)
    return folder


@pytest.fixture
def trained(finished, tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """The run `base` under runs/, and its weights as files of each kind; the state of its network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "runs")
    state = load_latest(Path("runs/base/checkpoints")).model_state
    torch.save(state, "base.pt")
    wrapped = {f"module._orig_mod.{name}": t for name, t in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, "wrapped.pth")
    kept = {n: t.clone() for n, t in state.items() if not n.endswith("num_batches_tracked")}
    safetensors.torch.save_file(kept, "base.safetensors")
    return state


def _start(*overrides: str) -> dict[str, torch.Tensor]:
    return build(vary(PLAIN, overrides), SOLO).model.state_dict()


def _events(name: str, event: str) -> list[dict]:
    records = read_journal(Path("runs") / name / "journal.jsonl")
    return [record for record in records if record.get("event") == event]


@pytest.mark.parametrize(
    "source", ["base.pt", "wrapped.pth", "base.safetensors", "base", "runs/base"]
)
def test_a_run_starts_from_the_weights_it_is_given(trained, source):
    state = _start(f"model.weights={source}")
    for name, tensor in trained.items():
        if not (name.endswith("num_batches_tracked") and source == "base.safetensors"):
            assert torch.equal(state[name], tensor), name


def test_a_run_that_averages_gives_what_it_evaluates_with(trained):
    recorded_run(compose([*TINY, "name=averaged", "train.ema=0.5"]), SOLO)
    averages = load_latest(Path("runs/averaged/checkpoints")).extra["ema"]
    state = _start("model.weights=averaged")
    assert all(torch.equal(state[name], tensor) for name, tensor in averages.items())


def test_no_bit_of_float64_weights_is_lost(trained):
    state = {name: t.double() + 1e-12 for name, t in trained.items() if t.is_floating_point()}
    torch.save(state, "fine.pt")
    begun = _start("model.weights=fine.pt", "train.precision=float64")
    assert all(torch.equal(begun[name], tensor) for name, tensor in state.items())


def test_fine_tuning_with_other_classes_leaves_the_output_layer_random(trained):
    cfg = compose(
        [*TINY, *OTHER, "name=tuned", "model.weights=base", "model.weights_match=backbone"]
    )
    state = build(cfg, SOLO).model.state_dict()
    fresh = build_model(cfg.model, (1, 8, 8), 4, cfg.seed).state_dict()
    assert torch.equal(state["output.weight"], fresh["output.weight"])
    assert torch.equal(state["hidden.0.affine.weight"], trained["hidden.0.affine.weight"])
    recorded_run(cfg, SOLO)
    (report,) = _events("tuned", "weights")
    assert (report["loaded"], report["left_out"], report["missing"]) == (7, 2, 0)
    assert report["first"] == {"left_out": ["output.weight", "output.bias"]}
    assert report["sha256"] == cfg.model.weights_sha256


def test_what_does_not_fit_is_named_with_both_shapes(trained, capsys):
    _start("model.weights=base.pt", "model.weights_match=any", "model.hidden=[8,8]", *OTHER)
    said = capsys.readouterr().err
    assert said.startswith(
        "weights: 7 tensors of base.pt loaded; missing 6 (hidden.1.affine.weight"
    )
    assert "of another shape 2 (output.weight (10, 8), the model has (4, 8)" in said


def test_a_run_resumes_without_the_weights_it_started_from(trained):
    overrides = [*TINY, "name=tuned", "model.weights=base.pt", "train.checkpoint_every=2"]
    once = recorded_run(compose(overrides), SOLO)
    Path("base.pt").unlink()
    shutil.rmtree("runs/tuned/checkpoints/step-000004")
    Path("runs/tuned/checkpoints/LATEST").write_text("step-000002\n")
    Path("runs/tuned/summary.json").unlink()
    again = recorded_run(compose(overrides), SOLO)
    assert (again.final, again.config_hash) == (once.final, once.config_hash)
    assert len(_events("tuned", "weights")) == 1


def test_the_content_is_part_of_a_run_and_its_place_is_not(trained):
    shutil.copy("base.pt", "copy.pt")
    first, second = (compose([*TINY, f"model.weights={name}.pt"]) for name in ("base", "copy"))
    assert config_hash(first) == config_hash(second) != config_hash(compose(TINY))
    recorded_run(vary(first, ["name=tuned"]), SOLO)
    Path("runs/tuned/summary.json").unlink()
    torch.save({name: tensor + 1 for name, tensor in trained.items()}, "base.pt")
    with pytest.raises(CheckpointError, match="has changed since the run was planned"):
        build(first, SOLO)
    with pytest.raises(CheckpointError, match=r"model.weights_sha256 was"):
        recorded_run(compose([*TINY, "name=tuned", "model.weights=base.pt"]), SOLO)


def test_a_run_goes_on_where_the_run_that_it_began_with_has_trained_on(trained):
    first = [*TINY, "optim.schedule=constant", "name=first", "tracking=journal"]
    recorded_run(compose([*first, "train.steps=2"]), SOLO)
    settings = [*TINY, "name=tuned", "model.weights=first", "tracking=journal"]
    began = compose(settings)
    recorded_run(began, SOLO)
    Path("runs/tuned/summary.json").unlink()
    recorded_run(compose([*first, "train.steps=4"]), SOLO)
    assert config_hash(compose([*settings, "name=other"])) != config_hash(began)
    assert config_hash(compose(settings)) == config_hash(began)
    recorded_run(compose(settings), SOLO)


def test_an_arm_has_weights_of_its_own(trained):
    cfg = compose([*TINY, "model.weights=base.pt"])
    other = vary(cfg, ["model.weights=base.safetensors"])
    assert other.model.weights_sha256 != cfg.model.weights_sha256 is not None


class Canary:
    """Makes a file where it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)


def _bad_files(state) -> None:
    Path("code.pt").write_bytes(pickle.dumps({"weight": Canary()}, protocol=2))
    torch.save({"weight": Canary()}, "code_too.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"weight": 3}, "number.pt")
    whole = Path("base.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-10])
    Path("empty.pt").write_bytes(b"")
    Path("notes.txt").write_text("weights")
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), "conv.pt")
    Path("runs/early/checkpoints").mkdir(parents=True)
    Path("runs/other").mkdir()
    shutil.copytree("runs/base", "runs/damaged")
    for file in Path("runs/damaged/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"x")


BAD = {
    "model.weights=nowhere.pt": (2, "model.weights=nowhere.pt is not there: a file"),
    "model.weights=bse": (2, "did you mean the run base?"),
    "model.weights=notes.txt": (2, "is not allowed: a file"),
    "model.weights=tuned": (2, "is not there"),
    "model.weights=early": (4, "has no whole checkpoint"),
    "model.weights=other": (2, "is a folder without a run in it"),
    "model.weights=damaged": (4, "has no whole checkpoint"),
    "model.weights=code.pt": (4, "code.pt holds no weights that can be read without running code"),
    "model.weights=code_too.pt": (4, "holds no weights that can be read without running code"),
    "model.weights=list.pt": (4, "a state_dict is needed, it holds a list"),
    "model.weights=number.pt": (4, "'weight' is a int, tensors by name are needed"),
    "model.weights=cut.safetensors": (4, "cut.safetensors holds no weights"),
    "model.weights=empty.pt": (4, "empty.pt holds no weights"),
    "model.weights=conv.pt": (4, "no tensor of model.weights fits"),
    "model.weights=base.pt model.hidden=[9]": (4, "weights_match=any loads what fits"),
    "model.weights=base.pt data=synthetic data.channels=1 data.image_size=8 data.num_classes=4": (
        4,
        r"output.weight \(10, 8\), the model has \(4, 8\).*backbone leaves the output layer as it is",
    ),
    "model.weights=ResNet18_Weights.DEFAULT": (2, "not allowed with model=mlp: it is of model=tor"),
    "model.weights=pretrained": (2, "it is of model=timm"),
    "model.weights_match=some": (2, "one of all, backbone, any"),
    f"model.weights_sha256={'a' * 64}": (2, "not allowed without model.weights"),
    "model.weights_sha256=abc": (2, "64 hexadecimal digits"),
    f"model.weights=base.pt model.weights_sha256={'a' * 64}": (4, "model.weights_sha256 demands a"),
    "model=resnet18 data=synthetic model.weights=ResNet18_Weights.IMAGENET1K_V2": (
        2,
        "did you mean ResNet18_Weights.IMAGENET1K_V1",
    ),
    "model=resnet18 data=synthetic model.weights=ResNet18_Weights.IMAGENET1K_V1": (
        2,
        "is not on this machine: model.download=true fetches it, or put https.*resnet18-.*pth as",
    ),
}


def test_weights_that_cannot_be_used_end_with_one_line(trained, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    _bad_files(trained)
    for overrides, (code, message) in BAD.items():
        with pytest.raises(SyncbnError, match=message) as raised:
            _start(*overrides.split())
        assert exit_code(raised.value) == code, overrides
        assert "\n" not in str(raised.value)
    assert not Path("canary").exists()


def test_a_run_cannot_start_from_itself(trained):
    with pytest.raises(UsageError, match="is the run itself"):
        compose([*TINY, "name=base", "model.weights=base"])


def test_published_weights_come_from_the_cache(tmp_path, monkeypatch):
    from torchvision.models import resnet18

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    Path("hub/checkpoints").mkdir(parents=True)
    state = resnet18().state_dict()
    torch.save(state, "hub/checkpoints/resnet18-f37072fd.pth")
    found = _start(
        *["model=resnet18", "data=synthetic", "model.weights=ResNet18_Weights.IMAGENET1K_V1"],
        "model.weights_match=backbone",
    )
    assert torch.equal(found["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_the_output_layer_is_the_last_with_a_matrix():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert output_layer(model) == "2."
    report = Report("here", "")
    assert fit(model, model.state_dict(), "all", report).keys() == model.state_dict().keys()
    assert json.loads(json.dumps(report.to_dict()))["loaded"] == report.loaded == 14
