"""Runs of a project's own model, data and task: the page's example, and what is refused."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from syncbn.compose import compose, vary
from syncbn.errors import DataError, SyncbnError, UsageError
from syncbn.extensions import load_extensions
from syncbn.runtime.base import Solo
from syncbn.train import recorded_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text()
EXAMPLE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^syncbn train (.*)$", PAGE, re.MULTILINE)
OWN = ["extensions=[mine]", "model=spots_net", "data=spots", "debug=tiny"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registrations: None) -> Path:
    """A folder with the page's example as `mine.py`, the current one; what it registers goes with the test."""
    (tmp_path / "mine.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_the_example_of_the_page_trains(project):
    summary = recorded_run(compose([*OWN, "train.steps=60"]), Solo(torch.device("cpu")))
    assert summary.final["test_error"] < 0.1  # at random: 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_compose(project, command):
    assert compose(command.split()).model.options == {"width": 32}


def test_an_arm_varies_registered_names_and_their_options(project):
    cfg = compose([*OWN, "model.options.width=8"])
    assert vary(cfg, ["norm=sync", "model.options.width=2"]).model.options == {"width": 2}
    other = vary(cfg, ["data=digits", "model=mlp"])
    assert (other.model.name, other.data.name) == ("mlp", "digits")
    assert vary(compose([*OWN[:1]]), ["model=spots_net"]).model.options == {"width": 16}
    with pytest.raises(UsageError, match=r"model=spot_net is not allowed: one of .*, spots_net"):
        vary(cfg, ["model=spot_net"])
    with pytest.raises(
        UsageError, match=r"model.options.depth is not an option of model=spots_net"
    ):
        vary(cfg, ["model.options.depth=2"])


def test_a_task_of_ones_own_decides_when_to_stop(project):
    cfg = compose(
        [*OWN, "task=angle", "task.options.beta=0.5", "train.eval_every=1", "train.patience=1"]
    )
    summary = recorded_run(cfg, Solo(torch.device("cpu")))
    last = {"train_loss", "test_loss", "test_degrees"}
    assert set(summary.final) == last | {"best_degrees", "best_step"}  # kept: it decides the end


BEFORE = {
    "extensions=[nowhere]": "there is no module 'nowhere', installed or as nowhere.py in",
    "extensions=mine": "extensions='mine' is not allowed: a list of module names",
    "extensions=[mine.py]": "there is no module|is not allowed",
    "extensions=[../mine]": "is not allowed: the name of a module",
    "model=spots": "Could not find 'model/spots'",
    "model.options.widht=3": "model.options.widht is no option of what model= chooses; did you mean 'width'",
    "model.options.width=wide": "model.options.width='wide' is not allowed: of type int",
    "data.options.size=[1]": "data.options.size=.* is not allowed: of type int",
    "+optim.options.beta=1": "optim.options.beta is there already|is no option",
    "task.label_smoothing=1": "task.label_smoothing=1.0 is not allowed",
}


@pytest.mark.parametrize("override", BEFORE)
def test_what_cannot_be_used_is_said_before_anything_starts(project, override):
    with pytest.raises(UsageError, match=BEFORE[override]):
        compose([*OWN, override])


BROKEN = {
    "raise RuntimeError('no licence')": r"importing it failed at mine.py:1 \(RuntimeError: no licence\)",
    "import not_there": "importing it failed at mine.py:1 .*No module named 'not_there'",
    "import syncbn.extend as e\ne.model('cnn')(lambda shape, num_classes: None)": "'cnn' is taken",
    "def f(:": "failed at mine.py:1 .*SyntaxError",
    "import sys; sys.exit(0)": "failed at mine.py:1 .it ends the process with 0",
    "import os; os._exit(0)": "failed at mine.py:1 .it ends the process with 0",
    "import syncbn.extend as e\n@e.model\ndef f(shape, num_classes): ...": "name <function f .* is not allowed",
    "import syncbn.extend as e\n@e.model('m')\ndef f(shape, num_classes, *, k: 'No'): ...": "failed at mine.py:2",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_module_that_cannot_be_imported_is_named_with_the_line(project, text):
    (project / "mine.py").write_text(text)
    with pytest.raises(UsageError, match=BROKEN[text]):
        load_extensions(["mine"])


HEAD = (
    EXAMPLE
    + """
class Listed(Dataset):
    def __init__(self, pairs): self.pairs = pairs
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i): return self.pairs[i]

@extend.data("bad")
def bad(root, split, *, kind: str = ""):
    x = torch.zeros(1, 4, 4)
    pairs = [(x, i % 2) for i in range(64)]
    if kind == "generator": return (p for p in pairs)
    if kind == "raises": raise OSError("no such tape")
    if kind == "empty": pairs = []
    if kind == "ragged": pairs[40:] = [(torch.zeros(1, 4, 5), 0)] * 24
    if kind == "single": pairs = [x] * 64
    if kind == "bytes": pairs = [(x.byte(), 0)] * 64
    if kind == "memory": return TensorDataset(torch.zeros(64, 1, 4, 4).byte(), torch.zeros(64).long())
    if kind == "flat": pairs = [(torch.zeros(4), 0)] * 64
    if kind == "negative": return TensorDataset(torch.zeros(64, 1, 4, 4), torch.zeros(64).long() - 2)
    if kind == "few":
        data = TensorDataset(torch.zeros(64, 1, 4, 4), torch.arange(64))
        data.classes = ["a", "b"]
        return data
    if kind == "range":
        data = Listed([(x, 7)] * 64)
        data.classes = ["a", "b"]
        return data
    return Listed(pairs)

@extend.model("two_channels")
def two_channels(shape, num_classes):
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))

@extend.model("nothing")
def nothing(shape, num_classes): ...

class Odd(nn.Module):
    def __init__(self, shape, num_classes, kind):
        super().__init__()
        if kind == "builds": raise KeyError("width")
        self.net, self.kind = spots_net(shape, num_classes), kind
        if kind == "frozen": self.net.requires_grad_(False)
    def forward(self, x):
        y = self.net(x)
        if self.training and self.kind == "raises": raise RuntimeError("no luck")
        if self.training and self.kind == "exits": raise SystemExit(0)
        if self.training and self.kind == "ends": __import__("os")._exit(0)
        return y.detach() if self.kind == "detached" else y

@extend.model("odd")
def odd(shape, num_classes, *, kind: str = ""): return Odd(shape, num_classes, kind)

@extend.optimizer("none")
def none(groups, lr): ...

@extend.task("half_done")
class HalfDone(extend.Task):
    def loss(self, output, target): ...
"""
)
DURING = {
    "data=bad data.options.kind=generator": (
        DataError,
        "map-style Dataset is needed, with __getitem__ and __len__",
    ),
    "data=bad data.options.kind=raises": (
        DataError,
        r"data=bad \(train\) cannot be read: OSError: no such tape",
    ),
    "data=bad data.options.kind=empty": (DataError, "has no samples"),
    "data=bad data.options.kind=ragged": (
        DataError,
        r"sample \d+ has an input of shape \(1, 4, 5\)",
    ),
    "data=bad data.options.kind=single": (DataError, "is no pair of tensors"),
    "data=bad data.options.kind=bytes": (DataError, r"inputs of torch.uint8: floating-point is"),
    "data=bad data.options.kind=memory": (DataError, r"inputs of torch.uint8: floating-point is"),
    "model=torchvision model.arch=densenet121 data=synthetic data.image_size=8": (
        UsageError,
        r"model=densenet121 cannot take inputs of shape \(3, 8, 8\): .*too small",
    ),
    "model=resnet18": (UsageError, "model.arch=resnet18 takes images of 3 channels, these have 1"),
    "data=bad data.options.kind=flat": (DataError, r"\(channels, height, width\) is needed"),
    "data=bad data.options.kind=range": (DataError, "has target 7: allowed are 0 to 1"),
    "data=bad data.augment=true": (UsageError, "data.augment=true is not allowed with data=bad"),
    "model=two_channels": (
        UsageError,
        r"model=two_channels cannot take inputs of shape \(1, 8, 8\)",
    ),
    "data=bad data.options.kind=negative": (DataError, "has target -2: classes are counted from 0"),
    "data=bad data.options.kind=few": (DataError, "sample 2 has target 2: allowed are 0 to 1"),
    "model=odd model.options.kind=builds": (
        UsageError,
        r"failed at mine.py:\d+ .KeyError: 'width'",
    ),
    "model=odd model.options.kind=raises": (UsageError, r"failed at mine.py:\d+ .RuntimeError: no"),
    "model=odd model.options.kind=exits": (
        UsageError,
        r"at mine.py:\d+ .it ends the process with 0",
    ),
    "model=odd model.options.kind=ends": (
        UsageError,
        r"at mine.py:\d+ .it ends the process with 0",
    ),
    "model=odd model.options.kind=frozen": (
        UsageError,
        "a model without a parameter that requires a gradient",
    ),
    "model=odd model.options.kind=detached": (
        UsageError,
        "depends on no parameter that is trained",
    ),
    "optim=none": (UsageError, "optim=none is a NoneType: it must be a torch.optim.Optimizer"),
    "task=half_done": (UsageError, "task=half_done lacks measures"),
    "model=nothing": (UsageError, "model=nothing is a NoneType: it must be a torch.nn.Module"),
}


@pytest.mark.parametrize("overrides", DURING)
def test_what_a_run_cannot_use_ends_it_with_one_line(project, overrides):
    (project / "mine.py").write_text(HEAD)
    kind, message = DURING[overrides]
    cfg = compose([*OWN, "train.steps=20", *overrides.split()])
    with pytest.raises(SyncbnError, match=message) as raised:
        recorded_run(cfg, Solo(torch.device("cpu")))
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("loaders", [0, 1])
def test_samples_come_from_loaders_as_from_the_rank_itself(project, loaders):
    own = [*OWN, "data.transforms={half:{},noise:{std:0.5}}"]
    cfg = compose([*own, f"data.num_loaders={loaders}", "name=loaded"])
    assert recorded_run(cfg, Solo(torch.device("cpu"))).final == pytest.approx(
        recorded_run(compose([*own, "name=plain"]), Solo(torch.device("cpu"))).final, abs=0
    )


def test_a_run_with_transforms_goes_on_as_if_it_had_not_stopped(project):
    own = [*OWN, "data.transforms.noise.std=0.5", "train.steps=4", "train.checkpoint_every=2"]
    whole = recorded_run(compose([*own, "name=whole"]), Solo(torch.device("cpu"))).final
    recorded_run(compose([*own, "name=cut"]), Solo(torch.device("cpu")))
    newest = project / "runs/cut/checkpoints"
    shutil.rmtree(newest / "step-000004")
    (project / "runs/cut/summary.json").unlink()
    (newest / "LATEST").write_text("step-000002\n")
    assert recorded_run(compose([*own, "name=cut"]), Solo(torch.device("cpu"))).final == whole


def test_a_resumed_run_says_that_the_source_of_an_extension_has_changed(project, capsys):
    cfg = compose([*OWN, "train.steps=4", "train.checkpoint_every=2", "tracking=journal"])
    recorded_run(cfg, Solo(torch.device("cpu")))
    (cfg.folder / "summary.json").unlink()
    (project / "mine.py").write_text(EXAMPLE + "# changed")
    recorded_run(cfg, Solo(torch.device("cpu")))
    assert "warning: the source of extension mine has changed" in capsys.readouterr().err
