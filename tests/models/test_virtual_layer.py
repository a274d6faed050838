"""Virtual ranks in one layer: who shares statistics with whom, whose running statistics are kept, and in which way."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from syncbn import virtual
from syncbn.arms import apply_arm
from syncbn.config import (
    ARMS,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    RunConfig,
    TrainConfig,
    resume_hash,
)
from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.virtual import Groups, Ranks, VirtualBatchNorm, groups_of

pytestmark = pytest.mark.untraced
EVERYWHERE = [arm for arm in ARMS if arm != "torch_sync"]
ONE_GROUP = ["sync", "big_batch"]
GROUPED = ["local", "local_avg", "sync_group", "ghost"]


def layer(ranks: Ranks, C: int = 3, momentum: float = 0.3) -> VirtualBatchNorm:
    """A layer in float64 whose parameters and statistics are not the ones it starts with."""
    generator = torch.Generator().manual_seed(0)
    norm = VirtualBatchNorm(C, ranks, momentum=momentum).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(C, generator=generator) + 0.5)
    return norm


def left_by(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and buffers after one step on `x`."""
    x = x.clone().requires_grad_()
    y = norm(x)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    y.backward(dy)
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()]


def on_each_rank(norm: VirtualBatchNorm, parts: list[torch.Tensor]) -> list[nn.BatchNorm2d]:
    """torch's batch norm, one for each of `parts`, each after its part."""
    ranks = []
    for part in parts:
        plain = nn.BatchNorm2d(norm.num_features, momentum=norm.momentum).double()
        plain.load_state_dict(norm.state_dict())
        plain(part)
        ranks.append(plain)
    return ranks


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(2, 5), st.integers(1, 4), st.sampled_from([(), (3,), (2, 3)]))
def test_groups_at_once_do_as_groups_one_by_one(num_groups, n, C, tail):
    x = torch.randn(num_groups * n, C, *tail, dtype=torch.float64)
    for averaged in (False, True):
        norm = layer(Ranks(num_groups, averaged=averaged), C)
        at_once, one_by_one = copy.deepcopy(norm), copy.deepcopy(norm)
        with patch.object(virtual, "MANY_GROUPS", 1):
            ours = left_by(at_once, x)
        with patch.object(virtual, "MANY_GROUPS", 100):
            theirs = left_by(one_by_one, x)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("many", [1, 100], ids=["at once", "one by one"])
@pytest.mark.parametrize("averaged", [False, True])
def test_each_rank_is_normalised_by_itself_and_rank_0_or_the_mean_is_kept(many, averaged):
    norm = layer(Ranks(4, averaged=averaged))
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64) * torch.arange(1.0, 9).view(-1, 1, 1, 1)
    ranks = on_each_rank(norm, list(x.split(2)))
    expected = torch.cat([copy.deepcopy(r)(p) for r, p in zip(ranks, x.split(2), strict=True)])
    with patch.object(virtual, "MANY_GROUPS", many):
        torch.testing.assert_close(norm(x), expected, rtol=1e-9, atol=1e-11)
    for name in ("running_mean", "running_var"):
        of_ranks = torch.stack([getattr(rank, name) for rank in ranks])
        kept = of_ranks.mean(0) if averaged else of_ranks[0]
        torch.testing.assert_close(getattr(norm, name), kept, rtol=1e-12, atol=0)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("ranks", "num_samples", "sizes", "owners"),
    [
        (Ranks(4), 8, (2, 2, 2, 2), 1),
        (Ranks(4), 10, (2, 3, 2, 3), 1),
        (Ranks(4, averaged=True), 10, (2, 3, 2, 3), 4),
        (Ranks(4), 2, (0, 1, 0, 1), 1),
        (Ranks(4, together=2), 10, (5, 5), 1),
        (Ranks(4, together=4), 10, (10,), 1),
        (Ranks(2, ghost_size=2), 8, (2, 2, 2, 2), 2),
        (Ranks(2, ghost_size=2), 11, (2, 3, 2, 2, 2), 2),
        (Ranks(2, ghost_size=4), 6, (3, 3), 1),
    ],
)
def test_a_batch_is_cut_as_ranks_share_it(ranks, num_samples, sizes, owners):
    assert groups_of(ranks, num_samples) == Groups(sizes, owners)


def test_a_group_without_samples_moves_nothing():
    norm = layer(Ranks(4))
    before = norm.running_mean.clone()
    assert norm(torch.randn(2, 3, 2, 2, dtype=torch.float64)).shape == (2, 3, 2, 2)
    assert torch.equal(norm.running_mean, before)


def test_an_average_over_ranks_without_samples_is_refused():
    with pytest.raises(UsageError, match=r"2 samples .* norm=local_avg .*train\.drop_last=true"):
        layer(Ranks(4, averaged=True))(torch.randn(2, 3, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_a_group_of_one_value_is_refused_as_torch_does(num_ranks):
    x = torch.randn(num_ranks, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        layer(Ranks(num_ranks))(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as theirs:
        nn.BatchNorm1d(3).double()(x[:1])
    assert str(ours.value) == str(theirs.value)


def test_in_evaluation_it_is_plain_batch_norm():
    norm = layer(Ranks(4)).eval()
    plain = nn.BatchNorm2d(3).double().eval()
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(norm(x), plain(x))


# In a model


def model_of(arm: str | None) -> nn.Module:
    model = build_model(ModelConfig(name="cnn", width=4), (1, 8, 8), 10, seed=0)
    if arm is None:
        return model
    return apply_arm(
        model, NormConfig(arm, group_size=2, num_groups=2, momentum=0.5), num_virtual=4
    )


@pytest.mark.parametrize("arm", EVERYWHERE)
def test_every_arm_starts_from_the_same_weights_and_trains_in_one_process(arm):
    plain, model = model_of(None).state_dict(), model_of(arm)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    if arm in GROUPED + ONE_GROUP:
        assert list(model.state_dict()) == list(plain)
    model(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_arms_that_share_over_all_ranks_are_torchs_own_layer():
    for arm in ONE_GROUP:
        norms = [m for m in model_of(arm).modules() if isinstance(m, nn.BatchNorm2d)]
        assert [(type(m), m.momentum) for m in norms] == [(nn.BatchNorm2d, 0.5)] * 3
    for arm in GROUPED:
        norms = [m for m in model_of(arm).modules() if isinstance(m, VirtualBatchNorm)]
        assert [m.momentum for m in norms] == [0.5] * 3


def test_a_run_on_other_virtual_ranks_is_another_run_to_resume():
    def run(num_ranks, is_virtual):
        train = TrainConfig(per_rank_batch=16 // num_ranks, virtual=is_virtual)
        return resume_hash(RunConfig(train=train, launcher=LauncherConfig(num_workers=num_ranks)))

    assert run(2, False) == run(4, False)
    assert run(2, True) != run(4, True)
