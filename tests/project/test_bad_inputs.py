"""Bad inputs of the open surface: each ends in one line that names what is wrong, with its exit code."""

import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
from programs import BIN

from syncbn.compose import compose
from syncbn.errors import SyncbnError, exit_code, in_words
from syncbn.runtime.base import Solo
from syncbn.train import recorded_run

HEAD = """
import os, sys, torch
from torch import nn
from torch.utils.data import Dataset
import syncbn.extend as extend

class Listed(Dataset):
    def __init__(self, pairs): self.pairs = pairs
    def __len__(self): return len(self.pairs)
    def __getitem__(self, i): return self.pairs[i]
"""
GOOD = "[(torch.full((1, 4, 4), i / 64.0), i % 2) for i in range(64)]"


def data(body):
    return f"@extend.data('cells')\ndef cells(root, split):\n    pairs = {GOOD}\n    {body}\n"


def model(body):
    return f"""
class Net(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        {body}
@extend.model('net')
def net(shape, n):
    return Net(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, n))
"""


def task(loss, measures="{'loss': loss, 'error': loss}"):
    return f"""
@extend.task('own')
class Own(extend.Task):
    def loss(self, output, target):
        loss = nn.functional.cross_entropy(output, target, reduction='sum')
        return {loss}
    def measures(self, output, target):
        loss = nn.functional.cross_entropy(output, target, reduction='sum')
        return {measures}
"""


def callback(body):
    return f"@extend.callback('told')\nclass Told(extend.Callback):\n    {body}\n"


def optimizer(made):
    return f"@extend.optimizer('own')\ndef own(groups, lr):\n    return {made}\n"


class Row(NamedTuple):
    """A bad input: what `mine.py` adds, the settings, the exit code, and words of the one line."""

    mine: str
    settings: str
    code: int
    words: str


FIT = "data=cells"
ROWS = {
    "import of nothing": Row("import not_there", "", 2, "No module named 'not_there'"),
    "raises at import": Row("raise RuntimeError('no licence')", "", 2, "no licence"),
    "sys.exit at import": Row("sys.exit(0)", "", 2, "ends the process with 0"),
    "os._exit at import": Row("os._exit(0)", "", 2, "ends the process with 0"),
    "interrupts at import": Row("raise KeyboardInterrupt", "", 2, "KeyboardInterrupt"),
    "taken name": Row("extend.model('cnn')(lambda shape, n: None)", "", 2, "'cnn' is taken"),
    "no extension": Row("", "extensions=[nowhere]", 2, "there is no module 'nowhere'"),
    "typo of a name": Row(data("return 0"), "data=cels", 2, "did you mean 'cells'"),
    "no length": Row(data("return iter(pairs)"), FIT, 3, "__len__"),
    "ragged": Row(
        data("pairs[40] = (torch.zeros(1, 4, 5), 0); return Listed(pairs)"),
        FIT + " train.steps=20",
        3,
        "has an input of shape (1, 4, 5)",
    ),
    "empty": Row(data("return Listed([])"), FIT, 3, "has no samples"),
    "float targets": Row(
        data("return Listed([(x, float(y)) for x, y in pairs])"), FIT, 2, "task=regression"
    ),
    "classes": Row(
        data("return Listed(pairs)"), FIT + " task=regression", 2, "task=classification"
    ),
    "target out of range": Row(
        data("d = Listed([(x, 7) for x, _ in pairs]); d.num_classes = 2; return d"),
        FIT,
        3,
        "target 7",
    ),
    "uint8": Row(
        data("return Listed([(x.byte(), y) for x, y in pairs])"), FIT, 3, "floating-point"
    ),
    "not (C, H, W)": Row(
        data("return Listed([(x.flatten(), y) for x, y in pairs])"),
        FIT,
        3,
        "(channels, height, width)",
    ),
    "data raise": Row(data("raise OSError('no such tape')"), FIT, 3, "no such tape"),
    "three channels": Row("", "model=torchvision model.arch=resnet18", 2, "3 channels"),
    "outputs of a shape": Row(model("return y[:, :, None, None]"), "model=net data=digits", 2, ""),
    "outputs in a dict": Row(
        model("return {'out': y}"), "model=net data=digits", 2, "a dict of outputs"
    ),
    "no module": Row(
        "@extend.model('net')\ndef net(shape, n): ...", "model=net", 2, "must be a torch.nn.Module"
    ),
    "no parameter": Row(
        "@extend.model('net')\ndef net(shape, n): return nn.Flatten()",
        "model=net norm=none",
        2,
        "without a parameter",
    ),
    "loss of a shape": Row(
        task("output.sum(1)"), "task=own", 2, "the sum over samples, (), is needed"
    ),
    "loss of NaN": Row(task("loss * float('nan')"), "task=own", 8, "finite"),
    "no loss measured": Row(
        task("loss", "{'error': loss}"), "task=own", 2, "'loss' must be among them"
    ),
    "in-place": Row(
        model("y = torch.relu(y); y2 = y.exp(); y2.mul_(2); return y2"),
        "model=net data=digits",
        2,
        "in-place",
    ),
    "closure": Row(
        optimizer("torch.optim.LBFGS([p for g in groups for p in g['params']], lr)"),
        "optim=own",
        2,
        "needs a closure",
    ),
    "unknown optimiser": Row("", "optim=sdg", 2, "did you mean 'sgd'"),
    "weights: a folder": Row("", "model.weights=.", 2, "a folder without a run"),
    "weights: missing": Row("", "model.weights=none.pt", 2, "is not there"),
    "weights: damaged": Row(
        "open('bad.pt', 'w').write('no')", "model.weights=bad.pt", 4, "bad.pt holds no weights"
    ),
    "weights: another": Row(
        "torch.save({'a': torch.ones(2)}, 'a.pt')",
        "model.weights=a.pt",
        4,
        "no tensor of model.weights fits",
    ),
    "callback raises": Row(
        callback("def after_step(self, moment): raise KeyError('x')"),
        "callbacks.told={}",
        2,
        "callback told failed in after_step",
    ),
    "callback's state": Row(
        callback("def state_dict(self): return [1]"),
        "callbacks.told={}",
        2,
        "gave a list: a dict is needed",
    ),
    "option: none": Row(
        "@extend.model('net')\ndef net(shape, n, *, width: int): ...",
        "model=net",
        2,
        "model.options.width has no value",
    ),
    "option: unknown": Row(
        "@extend.model('net')\ndef net(shape, n, *, width: int = 3): ...",
        "model=net model.options.widht=3",
        2,
        "did you mean 'width'",
    ),
    "option: ill-typed": Row(
        "@extend.model('net')\ndef net(shape, n, *, width: int = 3): ...",
        "model=net model.options.width=wide",
        2,
        "of type int",
    ),
    "precision": Row("", "train.precision=fp17", 2, "train.precision"),
    "half a range": Row("", "seed=range(", 2, "cannot be read"),
    "transform": Row(
        "@extend.transform('odd')\ndef odd(input): return input[0]",
        "data.transforms.odd={}",
        3,
        "(channels, height, width) is needed",
    ),
}
BASE = ("extensions=[mine]", "debug=tiny", "tracking=journal", "model.hidden=[4]")
LAUNCHERS = {
    "one": ("{python} -m syncbn train launcher.num_workers=1", 5.0),
    "local": ("{python} -m syncbn train launcher.num_workers=2", 5.0),
    "torchrun": ("{bin}/torchrun --standalone --nproc-per-node 2 -m syncbn train", 5.0),
    "ray": ("{python} -m syncbn train launcher=ray launcher.num_workers=2", 10.0),
}
"""Command and seconds that a failure may take on an idle machine."""


def settings_of(row):
    own = row.settings.split()
    base = [one for one in BASE if one.partition("=")[0] not in {o.partition("=")[0] for o in own}]
    return [*base, *own]


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_one_line_and_its_code(name, tmp_path, monkeypatch, own_registrations):
    row = ROWS[name]
    (tmp_path / "mine.py").write_text(HEAD + row.mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    with pytest.raises((SyncbnError, RuntimeError), match=re.escape(row.words)) as raised:
        recorded_run(compose(settings_of(row)), Solo(torch.device("cpu")))
    sys.modules.pop("mine", None)
    assert exit_code(raised.value) == row.code, in_words(raised.value)
    assert "\n" not in str(raised.value).strip()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", ROWS)
def test_a_bad_input_is_one_line_on_each_launcher(name, launcher, bench, record_property):
    row, (command, seconds) = ROWS[name], LAUNCHERS[launcher]
    (bench.folder / "mine.py").write_text(HEAD + row.mine)
    words = command.format(python=sys.executable, bin=BIN).split()
    began = time.monotonic()
    done: subprocess.CompletedProcess[str] = bench.run(*words, *settings_of(row))
    took = time.monotonic() - began
    record_property("seconds", took)
    sys.stdout.write(
        f"{launcher} {name}: {took:.1f} s of {seconds:g}, load {os.getloadavg()[0]:.1f}\n"
    )
    assert done.returncode == (1 if launcher == "torchrun" else row.code), done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("syncbn: error: ")]
    assert row.words in line
    if launcher != "torchrun":
        assert "Traceback" not in done.stderr
