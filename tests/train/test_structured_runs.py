"""Segmentation and detection through the unchanged loop: two ranks train as one process does."""

import re
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from syncbn.compose import compose
from syncbn.errors import UsageError
from syncbn.runtime.base import Solo
from syncbn.runtime.local import TorchrunRuntime
from syncbn.train import recorded_run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text()
EXAMPLE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
MORE = """

class Scenes(Dataset):
    num_classes = 3
    def __init__(self, boxes): self.boxes = boxes
    def __len__(self): return 24
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(1, 4, 4, generator=g)
        if self.boxes:
            return x, {"boxes": torch.rand(i % 3, 4, generator=g)}
        mask = torch.randint(0, 3, (4, 4), generator=g)
        mask[: i % 4] = 255
        return x, mask

@extend.data("scenes")
def scenes(root, split, *, boxes: bool = False): return Scenes(boxes)

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.out, self.aux = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
    def forward(self, x):
        h = self.body(x)
        return {"out": self.out(h), "aux": self.aux(h)}

class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))
    def forward(self, x, targets=None):
        found = self.body(x)
        if targets is None:
            return [{"boxes": row[None]} for row in found]
        far = [(row - t["boxes"]).square().sum() for row, t in zip(found, targets)]
        return {"box": torch.stack(far).sum() if far else found.sum(), "size": found.square().sum()}

@extend.model("two")
def two(shape, num_classes): return Two()

@extend.model("boxes")
def boxes(shape, num_classes): return Boxes()

@extend.task("detection")
class Detection(extend.Task):
    decides = "loss"
    def collate(self, samples): return torch.stack([x for x, _ in samples]), [t for _, t in samples]
    def outputs(self, model, inputs, target):
        return model(inputs, target) if model.training else model(inputs)
    def loss(self, output, target): return sum(output.values())
    def measures(self, output, target):
        far = [(o["boxes"] - t["boxes"]).double().square().sum() for o, t in zip(output, target)]
        return {"loss": sum(far, torch.zeros((), dtype=torch.float64))}
"""


@pytest.fixture
def project(tmp_path, monkeypatch, own_registrations):
    (tmp_path / "mine.py").write_text(EXAMPLE + MORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield tmp_path
    sys.modules.pop("mine", None)


def _run(name, runtime, *own):
    ranks = runtime.world_size
    return recorded_run(
        compose(
            [
                "extensions=[mine]",
                "debug=tiny",
                "norm=sync",
                f"name={name}",
                "data=scenes",
                "train.precision=float64",
                "train.steps=5",
                "optim.lr=0.05",
                f"launcher.num_workers={ranks}",
                f"train.per_rank_batch={6 // ranks}",
                *own,
            ]
        ),
        runtime,
    ).final


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "own",
    [
        ("model=two", "task=segmentation"),
        ("model=boxes", "task=detection", "data.options.boxes=true"),
    ],
    ids=["segmentation", "detection"],
)
def test_two_ranks_train_as_one_process(world_size, project, own):
    runtime = TorchrunRuntime(torch.device("cpu"))
    with chdir(project):  # a rank's current folder is its own
        ours = _run("both", runtime, *own)
        alone = _run(f"alone{runtime.rank}", runtime.solo(), *own)
    sys.path.remove(str(project))
    del sys.modules["mine"]
    assert ours == pytest.approx(alone, abs=1e-9)


def test_the_best_is_what_was_measured_where_more_is_better(project):
    own = ["model=two", "task=segmentation", "train.accumulate=2", "train.per_rank_batch=3"]
    final = _run(
        "best", Solo(torch.device("cpu")), *own, "train.eval_every=1", "train.keep_best=true"
    )
    assert final["best_iou"] >= final["test_iou"] > 0
    assert "best_error" not in final
    with pytest.raises(
        UsageError, match=r"train.target_error=0.1 is not allowed with task=segmentation"
    ):
        _run("target", Solo(torch.device("cpu")), *own, "train.target_error=0.1")
