"""Norm arms: they differ in the norm and in nothing else."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from syncbn.arms import ARM_MAKERS, GhostBatchNorm, apply_arm, num_channel_groups
from syncbn.config import ARMS, ModelConfig, NormConfig
from syncbn.errors import UsageError
from syncbn.models import build_model
from syncbn.norm import SyncBatchNorm

pytestmark = pytest.mark.untraced
ON_CPU = [arm for arm in ARMS if arm != "torch_sync"]
BATCH_NORM_ARMS = [arm for arm in ON_CPU if arm not in ("none", "group_norm")]
STANDS = {
    "none": nn.Identity,
    "local": nn.BatchNorm2d,
    "local_avg": nn.BatchNorm2d,
    "big_batch": nn.BatchNorm2d,
    "sync": SyncBatchNorm,
    "sync_group": SyncBatchNorm,
    "group_norm": nn.GroupNorm,
    "ghost": GhostBatchNorm,
}


def model_of(name: str, arm: str | None, **fields) -> nn.Module:
    """A small model, its norms replaced by `arm`."""
    cfg = ModelConfig(name=name, hidden=[12, 12], width=4)
    model = build_model(cfg, (3, 8, 8), num_classes=5, seed=0)
    return model if arm is None else apply_arm(model, NormConfig(arm, group_size=1, **fields))


def affine_weights(model: nn.Module) -> list[torch.Tensor]:
    return [
        tensor
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for tensor in module.parameters()
    ]


def test_every_arm_has_a_maker():
    assert set(ARM_MAKERS) == set(ARMS)


@pytest.mark.parametrize("arm", ON_CPU)
@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg"])
def test_logits_and_gradients_of_every_model_and_arm(name, arm):
    num_groups = 4
    model = model_of(name, arm, num_groups=num_groups)
    for training in (True, False):
        logits = model.train(training)(torch.rand(6, 3, 8, 8))
        assert logits.shape == (6, 5)
        model.zero_grad()
        logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arm", ON_CPU)
def test_all_arms_start_from_the_same_weights_and_draw_no_random_numbers(arm):
    plain = model_of("cnn", None)
    before = torch.get_rng_state()
    changed = apply_arm(model_of("cnn", None), NormConfig(arm, group_size=1))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(affine_weights(plain), affine_weights(changed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arm", ON_CPU)
def test_every_norm_is_replaced_also_deep_inside_a_resnet(arm):
    cfg = ModelConfig(name="torchvision", arch="resnet18")
    model = build_model(cfg, (3, 32, 32), 10, seed=0)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    apply_arm(model, NormConfig(arm, group_size=1))
    assert len(names) == 20
    assert {type(model.get_submodule(name)) for name in names} == {STANDS[arm]}


@pytest.mark.parametrize(("arm", "group"), [("sync", None), ("sync_group", 3)])
def test_sync_arms_share_statistics_with_the_world_or_with_their_group(arm, group):
    model = apply_arm(nn.Sequential(nn.BatchNorm1d(4)), NormConfig(arm, group_size=3))
    assert model[0].process_group == group


@pytest.mark.parametrize("arm", BATCH_NORM_ARMS)
def test_a_batch_norm_state_dict_fits_every_batch_norm_arm(arm):
    plain, changed = model_of("cnn", None).state_dict(), model_of("cnn", arm).state_dict()
    assert list(changed) == list(plain)
    assert all(torch.equal(changed[key], plain[key]) for key in plain)


def test_group_norm_keeps_the_names_of_its_parameters():
    plain, changed = model_of("cnn", None), model_of("cnn", "group_norm")
    assert [n for n, _ in changed.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("arm", [*BATCH_NORM_ARMS, "group_norm"])
def test_eps_and_momentum_come_with_the_arm(arm):
    model = model_of("cnn", arm, eps=0.25, momentum=0.5, num_groups=2)
    norms = [m for m in model.modules() if isinstance(m, STANDS[arm])]
    assert len(norms) == 3
    assert all(m.eps == 0.25 and getattr(m, "momentum", 0.5) == 0.5 for m in norms)


@pytest.mark.parametrize("arm", ON_CPU)
def test_learned_values_modes_and_sharing_survive(arm):
    shared = nn.BatchNorm2d(4)
    with torch.no_grad():
        shared.weight.fill_(3)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared)).eval()
    apply_arm(model, NormConfig(arm, group_size=1, num_groups=2))
    assert model[0] is model[1][1]
    assert not model[0].training
    if arm != "none":
        assert model[0].weight is shared.weight
        assert model[0].weight.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("arm", ["none", "group_norm", "ghost"])
def test_a_lone_batch_norm_is_replaced_too(arm):
    assert type(apply_arm(nn.BatchNorm2d(4), NormConfig(arm))) is STANDS[arm]


@pytest.mark.parametrize("arm", ["group_norm", "ghost"])
def test_a_norm_without_affine_parameters_stays_without(arm):
    norm = apply_arm(nn.BatchNorm2d(4, affine=False), NormConfig(arm, num_groups=2))
    assert list(norm.parameters()) == []
    assert norm(torch.rand(4, 4, 2, 2)).isfinite().all()


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("none", "torch_sync")])
def test_a_model_without_batch_norm_is_refused(arm):
    with pytest.raises(UsageError, match=f"norm={arm} has nothing to replace.*norm=none"):
        apply_arm(nn.Sequential(nn.Linear(2, 2)), NormConfig(arm, group_size=1))


def test_a_model_without_batch_norm_may_go_without():
    model = nn.Sequential(nn.Linear(2, 2))
    assert apply_arm(model, NormConfig("none")) is model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_sync_is_refused_without_a_gpu():
    with pytest.raises(UsageError, match=r"norm=torch_sync .* CUDA devices only"):
        model_of("mlp", "torch_sync")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_sync_converts_with_a_gpu():
    model = model_of("cnn", "torch_sync")
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 3


# Group norm


@given(st.integers(1, 200), st.integers(1, 64))
def test_channel_groups_are_the_largest_divisor_allowed(num_features, at_most):
    groups = num_channel_groups(num_features, at_most)
    assert num_features % groups == 0
    assert groups <= at_most
    assert not [n for n in range(groups + 1, at_most + 1) if num_features % n == 0]


def test_group_norm_of_single_values_is_refused():
    with pytest.raises(UsageError, match=r"norm\.num_groups=32 leaves groups of one value .* <= 6"):
        model_of("mlp", "group_norm", num_groups=32)


# Ghost batch norm


def ghost_pair(ghost_size: int, momentum: float = 0.3) -> tuple[GhostBatchNorm, nn.BatchNorm1d]:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(3, momentum=momentum).double()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.normal_()
        plain.running_mean.normal_()
        plain.running_var.uniform_(0.5, 2)
    ghost = GhostBatchNorm(3, ghost_size, momentum=momentum).double()
    ghost.load_state_dict(plain.state_dict())
    return ghost, plain


@pytest.mark.parametrize(
    ("num_samples", "parts"),
    [(8, [4, 4]), (9, [4, 5]), (11, [4, 7]), (3, [3]), (4, [4])],
)
def test_each_part_is_normalised_by_itself(num_samples, parts):
    ghost, plain = ghost_pair(4)
    x = torch.randn(num_samples, 3, dtype=torch.float64, requires_grad=True)
    y = ghost(x)
    expected = torch.cat([copy.deepcopy(plain)(part) for part in x.split(parts)])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(y)
    gradients = [torch.autograd.grad((weights * out).sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_running_statistics_move_once_towards_the_mean_over_parts():
    ghost, plain = ghost_pair(2, momentum=0.3)
    x = torch.randn(6, 3, dtype=torch.float64)
    ghost(x)
    parts = x.split(2)
    mean = torch.stack([part.mean(0) for part in parts]).mean(0)
    var = torch.stack([part.var(0) for part in parts]).mean(0)
    torch.testing.assert_close(ghost.running_mean, 0.7 * plain.running_mean + 0.3 * mean)
    torch.testing.assert_close(ghost.running_var, 0.7 * plain.running_var + 0.3 * var)
    assert ghost.num_batches_tracked == 1


def test_in_evaluation_a_ghost_is_plain_batch_norm():
    ghost, plain = ghost_pair(2)
    x = torch.randn(5, 3, dtype=torch.float64)
    before = ghost.running_mean.clone()
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x), rtol=0, atol=1e-12)
    assert torch.equal(ghost.running_mean, before)


def test_a_ghost_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="ghost_size=1 is not allowed"):
        GhostBatchNorm(3, 1)
