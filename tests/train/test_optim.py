"""Optimiser and learning rate: closed forms, and which parameters decay."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from syncbn.arms import apply_arm
from syncbn.checks import check
from syncbn.config import Config, ModelConfig, NormConfig, OptimConfig
from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.optim import build_optimizer, learning_rate

steps_and_step = st.integers(1, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@given(steps_and_step)
def test_a_constant_rate_stays(steps_and_step):
    steps, step = steps_and_step
    assert learning_rate(step, OptimConfig(lr=0.3, schedule="constant"), steps, 64) == 0.3


@given(steps_and_step)
def test_cosine_is_half_a_cosine_over_the_budget(steps_and_step):
    steps, step = steps_and_step
    rate = learning_rate(step, OptimConfig(lr=0.3, schedule="cosine"), steps, 64)
    assert rate == pytest.approx(0.3 * math.cos(math.pi * step / steps / 2) ** 2)


def test_cosine_after_a_warm_up_starts_at_the_peak_and_ends_near_0():
    cfg = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10)
    rates = [learning_rate(step, cfg, 110, 64) for step in range(110)]
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[109] == pytest.approx(math.sin(math.pi / 200) ** 2)


@given(st.integers(1, 50), st.sampled_from(["constant", "cosine", "step", "exponential"]))
def test_the_warm_up_is_a_straight_line_to_the_peak(warmup_steps, schedule):
    cfg = OptimConfig(lr=0.8, schedule=schedule, warmup_steps=warmup_steps)
    for step in range(warmup_steps):
        rate = learning_rate(step, cfg, 1000, 64)
        assert rate == pytest.approx(0.8 * (step + 1) / warmup_steps)
    assert learning_rate(warmup_steps, cfg, 1000, 64) == pytest.approx(0.8)


def test_a_warm_up_longer_than_the_run_is_all_warm_up():
    cfg = OptimConfig(lr=1.0, warmup_steps=100)
    assert [learning_rate(step, cfg, 3, 64) for step in range(3)] == [0.01, 0.02, 0.03]


def test_step_multiplies_by_gamma_at_each_milestone():
    cfg = OptimConfig(lr=1.0, schedule="step", milestones=[0.5, 0.75], gamma=0.1)
    rates = [learning_rate(step, cfg, 100, 64) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(st.integers(0, 5000), st.integers(1, 2000), st.integers(0, 100))
def test_exponential_multiplies_by_gamma_every_decay_steps(after, decay_steps, warmup_steps):
    cfg = OptimConfig(
        lr=2.0,
        schedule="exponential",
        gamma=0.5,
        decay_steps=decay_steps,
        warmup_steps=warmup_steps,
    )
    now, later = (
        learning_rate(warmup_steps + after + more, cfg, 10_000, 64) for more in (0, decay_steps)
    )
    assert now == pytest.approx(2 * 0.5 ** (after / decay_steps))
    assert later == pytest.approx(now / 2)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_the_rate_scales_with_the_global_batch(rule, factor):
    cfg = OptimConfig(lr=0.1, schedule="constant", lr_scaling=rule, base_batch=256)
    assert learning_rate(0, cfg, 10, 1024) == pytest.approx(0.1 * factor)
    cfg.warmup_steps = 4
    assert learning_rate(0, cfg, 10, 1024) == pytest.approx(0.1 * factor / 4)


# Optimisers


def small_model(arm: str = "local") -> nn.Module:
    cfg = ModelConfig(name="cnn", width=4)
    model = build_model(cfg, (1, 8, 8), 10, seed=0)
    return apply_arm(model, NormConfig(arm, group_size=1, num_groups=2))


@pytest.mark.parametrize("arm", ["none", "local", "sync", "group_norm", "ghost"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_norm_parameters_and_biases_do_not_decay(name, arm):
    model = small_model(arm)
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            decays = key == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            assert decay.pop(id(parameter)) == (0.5 if decays else 0.0)
    assert not decay


def test_everything_decays_when_asked_to():
    model = small_model()
    cfg = OptimConfig(weight_decay=0.5, decay_norm_and_bias=True)
    groups = build_optimizer(model, cfg).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [
        (len(list(model.parameters())), 0.5)
    ]


REFERENCES = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, foreach=False, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.8, 0.999), foreach=False),
    "adamw": lambda p: torch.optim.AdamW(
        p, 0.1, betas=(0.8, 0.999), weight_decay=0.0, foreach=False
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_plain_optimiser_and_repeat_bit_for_bit(name, dtype):
    model = nn.Linear(5, 3).to(dtype)
    copies = [copy.deepcopy(model) for _ in range(3)]
    cfg = OptimConfig(name=name, lr=0.1, momentum=0.8, nesterov=name == "sgd")
    optimizers = [
        build_optimizer(copies[0], cfg),
        build_optimizer(copies[1], cfg),
        REFERENCES[name](copies[2].parameters()),
    ]
    x = torch.randn(4, 5, dtype=dtype)
    for _ in range(5):
        for one, optimizer in zip(copies, optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(copies[0].weight, copies[1].weight)
    torch.testing.assert_close(copies[0].weight, copies[2].weight)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("momentum", 1.0, r"optim\.momentum=1\.0"), ("momentum", 0.0, r"optim\.nesterov=True needs")],
)
def test_a_momentum_that_no_optimiser_takes_is_refused(field, value, says):
    cfg = Config(optim=OptimConfig(nesterov=True))
    setattr(cfg.optim, field, value)
    with pytest.raises(UsageError, match=says):
        check(cfg)
