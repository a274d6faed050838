"""Tasks beyond a tensor a sample: metrics over ranks, masks, boxes, models that return dicts, and what is refused."""

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, PearsonCorrCoef
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
)

from syncbn.config import TaskConfig
from syncbn.data.registered import DatasetSamples
from syncbn.data.transforms import Treatment
from syncbn.errors import UsageError
from syncbn.runtime.base import Solo
from syncbn.runtime.local import TorchrunRuntime
from syncbn.structure import count, cut, part, stacked
from syncbn.tasks import Task, build_task, collate_of, metrics_of, outputs_of, update_of, weight_of
from syncbn.train.evaluation import evaluate, own_batches

CPU = torch.device("cpu")


class _Extremes(Metric):
    """A state of each kind that torchmetrics reduces, and one of its own reduction."""

    def __init__(self):
        super().__init__()
        self.add_state("low", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(0.0), dist_reduce_fx="max")  # wrong for an empty rank
        self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")
        self.add_state("product", torch.tensor(1.0), dist_reduce_fx=lambda values: values.prod(0))
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output, target):
        first = self.seen == 0
        self.low = torch.minimum(self.low, output.min())
        self.high = output.max() if first else torch.maximum(self.high, output.max())
        self.mean = (self.mean * self.seen + output[:, 0].sum()) / (self.seen + len(output))
        self.product = self.product * output[:, 0].prod()
        self.seen += len(output)

    def compute(self):
        return {key: getattr(self, key) for key in ("low", "high", "mean", "product")}


class _Many(Task):
    decides, lower_is_better = "top1", False

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target, reduction="sum")

    def measures(self, output, target):
        return {"loss": self.loss(output, target)}

    def metrics(self, num_classes):
        return {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=5),
            "auroc": MulticlassAUROC(num_classes, average="macro"),
            "mse": MeanSquaredError(),
            "pearson": PearsonCorrCoef(),
            "confusion": MulticlassConfusionMatrix(num_classes),
            "mean": MeanMetric(),
            "extremes": _Extremes(),
        }

    def update(self, metrics, output, target):
        for name in ("top1", "top5", "auroc", "confusion", "extremes"):
            metrics[name].update(output, target)
        for name in ("mse", "pearson"):
            metrics[name].update(output[:, 0].contiguous(), target.double())
        metrics["mean"].update(output)


def _all_metrics(runtime, num_samples):
    generator = torch.Generator().manual_seed(3)
    x = -1 - torch.rand(num_samples, 7, generator=generator)
    y = torch.arange(num_samples) % 7
    own = list(own_batches(num_samples, runtime, 2))
    batches = ((x[i], y[i]) for i in own)
    return evaluate(nn.Identity(), _Many(), batches, runtime, torch.float32, 7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("num_samples", [11, 2])
def test_metrics_of_all_ranks_are_those_of_one_process(world_size, num_samples):
    # Of 3 ranks with 2 samples one has none.
    ours, table = _all_metrics(TorchrunRuntime(CPU), num_samples)
    alone, expected = _all_metrics(Solo(CPU), num_samples)
    assert len(ours) == 11
    if num_samples <= world_size:
        # torchmetrics takes the spread of one sample a rank for none, and its correlation for undefined.
        del ours["test_pearson"], alone["test_pearson"]
    assert ours == pytest.approx(alone, abs=1e-6, nan_ok=True)
    assert table == expected
    assert sum(map(sum, table["confusion"])) == num_samples


def test_a_batch_of_parts_is_counted_cut_and_stacked():
    batch = {"mask": torch.arange(5), "boxes": [[i] for i in range(5)]}
    assert count(batch) == 5
    assert [p["boxes"] for p in cut(batch, [2, 3])] == [[[0], [1]], [[2], [3], [4]]]
    assert cut(batch, [2, 3])[1]["mask"].tolist() == [2, 3, 4]
    assert count(part(batch, 0, 0)) == 0
    both = stacked([(torch.ones(2), {"a": 1}), (torch.zeros(2), {"a": 2})])
    assert both[0].shape == (2, 2)
    assert both[1]["a"].tolist() == [1, 2]


class _Listed:
    num_classes = 3

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.ones(1, 2, 2), {"boxes": torch.zeros(i, 4)}


def _pairs(samples):
    return torch.stack([x for x, _ in samples]), [target for _, target in samples]


def test_boxes_of_varying_number_are_collated_by_the_task():
    samples = DatasetSamples(_Listed(), torch.arange(4), "data=boxes")
    x, target = samples.batch(0, torch.tensor([0, 3]), Treatment(collate=_pairs))
    assert x.shape == (2, 1, 2, 2)
    assert [len(t["boxes"]) for t in target] == [0, 3]
    with pytest.raises(
        Exception, match="cannot be stacked: make them alike, or give the task a collate"
    ):
        samples.batch(0, torch.tensor([0, 3]), Treatment())


def test_the_confusion_matrix_is_asked_for():
    task = build_task(TaskConfig(confusion=True))
    x, y = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    numbers, tables = evaluate(nn.Identity(), task, [(x, y)], Solo(CPU), torch.float32, 3)
    assert tables == {"confusion_matrix": [[1, 0, 0], [0, 1, 0], [0, 1, 1]]}
    assert numbers["test_macro_accuracy"] == pytest.approx(5 / 6)
    assert metrics_of(build_task(TaskConfig()), 3) == {}


def test_regression_measures_r2():
    x, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0])
    task = build_task(TaskConfig(name="regression"))
    numbers, _ = evaluate(nn.Identity(), task, [(x, y)], Solo(CPU), torch.float32, 1)
    assert numbers["test_r2"] == pytest.approx(0.5)
    assert numbers["test_loss"] == pytest.approx(1 / 3)


class _Wrong(Task):
    def __init__(self, gives):
        self.gives = gives

    def loss(self, output, target): ...
    def measures(self, output, target): ...
    def weight(self, target):
        return self.gives()

    def outputs(self, model, inputs, target):
        return self.gives()

    def metrics(self, num_classes):
        return self.gives()

    def update(self, metrics, output, target):
        return self.gives()

    def collate(self, samples):
        return self.gives()


def _fails():
    raise RuntimeError("no tape\nand more")


SAMPLES = [(torch.ones(1), 0), (torch.ones(1), 1)]
READS = {
    "weight": lambda task: weight_of(task, torch.ones(2)),
    "outputs": lambda task: outputs_of(task, nn.Identity(), torch.ones(2), torch.ones(2)),
    "metrics": lambda task: metrics_of(task, 3),
    "update": lambda task: update_of(task, {}, torch.ones(2), torch.ones(2)),
    "collate": lambda task: collate_of(task)(SAMPLES),
}


@pytest.mark.parametrize("what", READS)
def test_a_method_that_fails_is_named_in_one_line(what):
    with pytest.raises(
        UsageError, match=rf"{what} of the task _Wrong failed.*: RuntimeError: no tape$"
    ):
        READS[what](_Wrong(_fails))


@pytest.mark.parametrize(
    ("what", "gives", "message"),
    [
        ("weight", -1, "gave -1.0: a number from 0"),
        ("weight", torch.ones(2), r"gave \[1.0, 1.0\]"),
        ("weight", float("nan"), "gave nan"),
        ("metrics", [], "gave a list: metrics of torchmetrics by name"),
        ("metrics", {"a": 1}, "gave a int: metrics"),
        ("metrics", {"../a": MeanMetric()}, "names one '../a'"),
        ("collate", None, r"gave a NoneType: \(inputs, targets\)"),
        ("collate", (torch.ones(2), "ab"), "gave|failed"),
        ("collate", (torch.ones(3), torch.ones(2)), "as inputs of 2 sample"),
    ],
)
def test_what_a_method_gives_is_checked(what, gives, message):
    with pytest.raises(UsageError, match=message):
        READS[what](_Wrong(lambda: gives))
