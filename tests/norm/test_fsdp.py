"""Fully sharded parameters (FSDP2): the same numbers as one process on the whole batch."""

import copy

import pytest
import torch
from oracle import assert_close, own_part
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import syncbn

SIZES = {2: (5, 3), 3: (3, 1, 4)}


def _model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(5 * 4, 4)),
    ).double()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def _sharded(model, world_size, by_layer, **options):
    """Each block is a unit of its own, or each norm too, where the layer itself is what is sharded."""
    mesh = init_device_mesh("cpu", (world_size,))
    if by_layer:
        for layer in [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
            fully_shard(layer, mesh=mesh, **options)
    for block in model:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def _train(model, optimizer, sizes, world_size, steps):
    for step in range(steps):
        x, target = _batch(step)
        if sizes is not None:
            x, target = own_part(x, sizes), own_part(target, sizes)
        (cross_entropy(model(x), target, reduction="sum") * world_size / 8).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("by_layer", [False, True], ids=["blocks", "layers"])
@pytest.mark.parametrize("convert_first", [True, False], ids=["converted", "converted-after"])
def test_sharded_training_follows_one_process(world_size, by_layer, convert_first):
    oracle = _model()
    model = copy.deepcopy(oracle)
    if convert_first:
        syncbn.convert_sync_batchnorm(model)
    _sharded(model, world_size, by_layer)
    if not convert_first:
        syncbn.convert_sync_batchnorm(model, strict=True)
    assert isinstance(model[0][1].weight, DTensor)
    for net, sizes, count in ((oracle, None, 1), (model, SIZES[world_size], world_size)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        _train(net, optimizer, sizes, count, steps=4)
    state = oracle.state_dict()
    for name, value in model.state_dict().items():
        assert_close(_whole(value).double(), state[name].double(), 1e-9, name)


@pytest.mark.world_size(2)
def test_sharded_layers_revert_where_that_is_safe_and_say_so_where_not(world_size):
    model = _sharded(syncbn.convert_sync_batchnorm(_model()), world_size, by_layer=False)
    syncbn.revert_sync_batchnorm(model)
    assert type(model[0][1]) is nn.BatchNorm2d
    layers = _sharded(syncbn.convert_sync_batchnorm(_model()), world_size, by_layer=True)
    with pytest.raises(ValueError, match=r"0\.1 became a FSDPSyncBatchNorm after"):
        syncbn.revert_sync_batchnorm(layers)


@pytest.mark.world_size(2)
def test_half_precision_parameters_keep_full_statistics(world_size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = syncbn.convert_sync_batchnorm(_model().float())
    oracle = _model().float()
    _sharded(model, world_size, by_layer=False, mp_policy=policy)
    x, target = _batch(0)
    y = model(own_part(x.float(), (5, 3)))
    cross_entropy(y, own_part(target, (5, 3))).backward()
    oracle(x.float())
    assert y.dtype == torch.bfloat16
    assert model[0][1].running_var.dtype == torch.float32
    assert model[0][1].weight.grad.dtype == torch.float32
    assert_close(model[0][1].running_var, oracle[0][1].running_var, 2e-2, "running_var")


@pytest.mark.world_size(2)
def test_populations_are_those_of_the_unsharded_model(world_size):
    expected = _model()
    model = _sharded(syncbn.convert_sync_batchnorm(_model()), world_size, by_layer=False)
    x, _ = _batch(0)
    syncbn.recalibrate(model, [own_part(x, (5, 3))])
    syncbn.recalibrate(expected, [x], process_group=1)
    for name, buffer in model.named_buffers():
        assert_close(buffer.double(), expected.get_buffer(name).double(), 1e-10, name)
