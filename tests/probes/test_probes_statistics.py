"""Probes that run the network aside: population, leak, smoothness."""

import math

import pytest
import torch
from probe_kit import Net, batch, column, linear, split, view_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from syncbn.config import LauncherConfig, ProbeConfig, RunConfig, TrainConfig
from syncbn.probes import PROBES
from syncbn.probes.population import running_gaps
from syncbn.probes.smoothness import FACTORS, along_gradient, loss_and_gradient
from syncbn.virtual import Ranks, VirtualBatchNorm

CLASSES = torch.tensor([0, 0, 1, 1])


class SignOf(nn.Module):
    """Says class 1 of an image whose normalised value is positive."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, images: Tensor) -> Tensor:
        values = self.norm(images)
        return torch.cat([-values, values], dim=1)


def _config(per_rank_batch: int = 4, num_workers: int = 1, shares: str = "shuffled") -> RunConfig:
    return RunConfig(
        train=TrainConfig(per_rank_batch=per_rank_batch, virtual=True, shares=shares),
        launcher=LauncherConfig(num_workers=num_workers),
    )


def test_population_compares_running_precise_and_batch_statistics():
    train, test = split(column(0, 2, 4, 10)), split(column(3, 5, 20, 30), torch.ones(4).long())
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(25.0)
    found = PROBES["population"](
        view := view_of(SignOf(norm), test, train, _config(), step=9)
    ).conclude(view)
    assert found["test_error_running"] == 0.75  # three values lie below 25
    assert found["test_error_precise"] == 0.25  # one lies below 4, the mean of the training images
    assert found["test_error_batch"] == 0.5  # two lie below their own mean
    assert found["precise_gap"] == 0.5
    variance = 56 / 3  # of the training images, unbiased
    assert found["running_mean_gap"] == pytest.approx(21 / math.sqrt(variance), rel=1e-5)
    assert found["running_var_gap"] == pytest.approx(math.log(variance), rel=1e-5)
    assert found["batch_dependence"] < 1e-12


def test_batch_statistics_are_those_of_the_arms_ranks_on_batches_dealt_as_in_training():
    images, labels = column(0, 30, 10, 40), torch.tensor([0, 1, 0, 1])
    errors = {}
    for shares in ("shuffled", "by_class"):
        cfg = _config(2, 2, shares)
        view = view_of(SignOf(VirtualBatchNorm(1, Ranks(2))), split(images, labels), cfg=cfg)
        errors[shares] = PROBES["population"](view).conclude(view)["test_error_batch"]
    # in pairs (0, 30) and (10, 40) classes part; in pairs of one class, half of each is wrong
    assert errors == {"shuffled": 0.0, "by_class": 0.5}


def test_a_last_smaller_test_batch_is_left_out():
    images, labels = column(0, 30, 10, 40, 7), torch.tensor([0, 1, 0, 1, 1])
    view = view_of(SignOf(nn.BatchNorm1d(1)), split(images, labels), cfg=_config(2))
    assert PROBES["population"](view).conclude(view)["test_error_batch"] == 0.0


def test_without_batch_norms_all_statistics_are_alike_and_gaps_are_no_numbers():
    view = view_of(SignOf(nn.Identity()), split(column(1, -1), torch.tensor([1, 1])))
    found = PROBES["population"](view).conclude(view)
    assert (found["test_error_running"], found["test_error_precise"]) == (0.5, 0.5)
    assert found["precise_gap"] == 0
    assert math.isnan(found["running_mean_gap"])


def test_an_output_that_hangs_on_its_batch_is_found():
    class Cheat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + images.mean(0)

    view = view_of(SignOf(Cheat()), split(column(0, 0, 6)))
    assert PROBES["population"](view).conclude(view)["batch_dependence"] == 4  # 6 alone, 2 in three


def test_gaps_of_running_statistics_are_medians_over_channels():
    running = [(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0])), (torch.ones(1), torch.ones(1))]
    precise = [(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 1.0])), (torch.ones(1), torch.ones(1))]
    assert running_gaps(running, precise, eps=0.0) == pytest.approx((0.5, 0.0))


def test_leak_is_the_error_that_leaving_training_mode_adds_on_the_batches_trained_on():
    images = column(0, 10, 30, 40)
    norm = VirtualBatchNorm(1, Ranks(2))
    norm.running_mean.fill_(20.0)
    # by class, each virtual rank gets (0, 10) or (30, 40): half of each is taken for the other class
    cfg = _config(2, 2, "by_class")
    view = view_of(SignOf(norm), split(images, CLASSES), cfg=cfg, step=3)
    found = PROBES["leak"](view).conclude(view)
    assert found == {"train_mode_error": 0.5, "eval_mode_error": 0.0, "leak_gap": -0.5}


def test_leak_looks_at_the_last_batches_in_the_order_of_training():
    images = column(*range(8))
    view = view_of(SignOf(nn.BatchNorm1d(1)), split(images), cfg=_config(2), step=70)
    seen = [x.flatten().tolist() for x, _ in view.trained_on(50)]
    assert seen == [view.stream.batch(step).tolist() for step in range(20, 70)]
    assert len(list(view.trained_on(100))) == 70


class Weight(nn.Module):
    """Logits (w, 0) for every image: the loss of class 0 is log(1 + exp(-w)), its gradient -sigmoid(-w)."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.w, self.w * 0]).expand(len(images), 2)


def test_smoothness_is_measured_along_the_gradient_at_ten_step_lengths():
    images, lr, w = column(1, 2), 3.0, 0.5
    model = Weight(w)
    view = view_of(model, split(images), batch=batch(images, torch.tensor([0, 0])), lr=lr)
    probe = PROBES["smoothness"](view)
    found = probe.look(view)
    assert pytest.approx(torch.linspace(0.5, 4, 10).tolist()) == FACTORS
    g = -1 / (1 + math.exp(w))
    points = [w - factor * lr * g for factor in FACTORS]
    losses = [math.log1p(math.exp(-x)) for x in points]
    changes = [abs(g + 1 / (1 + math.exp(x))) for x in points]
    betas = [c / (f * lr * abs(g)) for c, f in zip(changes, FACTORS, strict=True)]
    expected = {
        "loss_range": max(losses) - min(losses),
        "gradient_predictiveness": max(changes),
        "effective_beta": max(betas),
    }
    assert found == pytest.approx(expected)
    assert model.w.item() == w
    assert model.w.grad is None


def test_final_smoothness_is_the_geometric_mean_of_the_looks_that_count():
    images = column(1, 2)
    model = Weight(0.5)
    cfg = RunConfig(probe=ProbeConfig(first=10))
    views = [
        view_of(model, split(images), cfg=cfg, step=step, lr=lr, batch=batch(images, CLASSES[:2]))
        for step, lr in ((0, 5.0), (10, 1.0), (20, 2.0))
    ]
    probe = PROBES["smoothness"](views[0])
    _, one, other = (probe.look(view) for view in views)
    assert probe.look(view_of(model, split(images), cfg=cfg, step=30)) == {}  # no batch
    finals = probe.conclude(views[0])
    expected = {name: math.sqrt(one[name] * other[name]) for name in one}
    assert finals == pytest.approx(expected)


def test_smoothness_walks_in_training_mode_and_moves_no_buffer():
    model = Net(nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3)), width=3).double()
    images, labels = column(1, 2, 5, 9), CLASSES
    loss = cross_entropy(model(images), labels)
    loss.backward()
    before = [buffer.clone() for buffer in model.buffers()]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    again, gradient = loss_and_gradient(model, weights, batch(images, labels))
    assert again == loss.item()
    assert all(torch.equal(gradient[name], p.grad) for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_smoothness_sees_the_same_dropout_mask_at_every_point():
    model = nn.Sequential(nn.Dropout(0.5), linear([[0.0], [0.0]], [0.0, 0.0]))
    images = torch.ones(64, 1, dtype=torch.float64)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    data = batch(images, torch.zeros(64, dtype=torch.int64))
    (_, one), (_, other) = (loss_and_gradient(model, weights, data) for _ in range(2))
    assert torch.equal(one["1.weight"], other["1.weight"])


def test_a_loss_that_overflows_along_the_gradient_counts_as_infinite():
    class Pole(Weight):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits if self.w == 0.5 else logits * math.nan

    images = column(1, 2)
    found = along_gradient(Pole(0.5), batch(images, torch.tensor([0, 0])), 1.0)
    assert set(found.values()) == {math.inf}


def test_where_the_gradient_is_0_there_is_nothing_to_walk_along():
    images = column(1, 2)
    assert along_gradient(Weight(1e4), batch(images, torch.tensor([0, 0])), 1.0) == {}
