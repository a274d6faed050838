"""Meta and fake tensors: shapes without an exchange, whatever group is up."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import syncbn

GIVEN = {
    "plain": lambda x: {},
    "fused": lambda x: {"residual": torch.empty_like(x)},
    "masked": lambda x: {"mask": torch.ones(x.shape[0], 1, device=x.device, dtype=torch.bool)},
}
each_given = pytest.mark.parametrize("given", GIVEN)


def _check_meta(given):
    layer = syncbn.SyncBatchNorm(4, act="relu", device="meta")
    x = torch.empty(2, 4, device="meta", requires_grad=True)
    y = layer(x, **GIVEN[given](x))
    y.sum().backward()
    assert y.is_meta
    assert y.shape == x.grad.shape == (2, 4)


def _check_fake(given):
    with FakeTensorMode():
        layer = syncbn.SyncBatchNorm(4, act="relu")
        x = torch.randn(2, 4, requires_grad=True)
        y = layer(x, **GIVEN[given](x))
        y.sum().backward()
    assert y.shape == x.grad.shape == (2, 4)


@each_given
@pytest.mark.parametrize("check", [_check_meta, _check_fake])
def test_tensors_without_values_give_shapes_alone(check, given):
    check(given)


@pytest.mark.world_size(2)
@each_given
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("process_group", [None, "node", 1])
def test_tensors_without_values_give_shapes_on_one_rank_while_the_other_does_nothing(
    kind, given, process_group, world_size
):
    if torch.distributed.get_rank() == 0:
        {"meta": _check_meta, "fake": _check_fake}[kind](given)
    # ranks that exchanged something above would be out of step here
    layer = syncbn.SyncBatchNorm(3, process_group=process_group)
    layer(torch.randn(4, 3)).sum().backward()


@pytest.mark.world_size(2)
def test_a_model_moved_to_meta_gives_shapes(world_size):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), syncbn.SyncBatchNorm(5), torch.nn.ReLU())
    y = model.to("meta")(torch.empty(2, 3, 8, 8, device="meta"))
    assert y.shape == (2, 5, 6, 6)


@pytest.mark.world_size(2)
def test_the_function_gives_shapes_too(world_size):
    y = syncbn.sync_batch_norm(torch.empty(2, 4, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 4)
