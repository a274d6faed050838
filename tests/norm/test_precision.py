"""What holds in float32, in half precision and under autocast, on ranks as in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, batch_norm, forward_backward, own_part
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

SIZES = (4, 2)


def _summed(gradient):
    total = gradient.clone()
    dist.all_reduce(total)
    return total


@pytest.mark.world_size(2)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_gradients_of_parameters_stay_within_their_bound(world_size, memory_format):
    whole = (torch.randn(6, 5, 9, 9) * 2 + 3).to(memory_format=memory_format)
    dy = torch.randn(6, 5, 9, 9)
    oracle, layer = batch_norm(5).double(), syncbn.convert_sync_batchnorm(batch_norm(5))
    forward_backward(oracle, whole.double(), dy.double())
    forward_backward(layer, own_part(whole, SIZES), own_part(dy, SIZES))
    for name, parameter in layer.named_parameters():
        expected = oracle.get_parameter(name).grad.float()
        assert_close(_summed(parameter.grad), expected, 1e-4, name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_parameters", [False, True])
def test_half_input_gives_the_gradients_of_its_float32_values(world_size, dtype, half_parameters):
    whole = (torch.randn(6, 5, 9, 9) * 2 + 3).to(dtype)
    dy = torch.randn(6, 5, 9, 9).to(dtype)
    oracle, layer = batch_norm(5), syncbn.convert_sync_batchnorm(batch_norm(5))
    if half_parameters:
        layer.to(dtype)
        oracle.load_state_dict(layer.state_dict())  # the parameters as rounded
    forward_backward(oracle, whole.float(), dy.float())
    forward_backward(layer, own_part(whole, SIZES), own_part(dy, SIZES))
    bound = 1e-2 if half_parameters else 1e-4
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        expected = oracle.get_parameter(name).grad
        assert_close(_summed(parameter.grad.float()), expected, bound, name)


@pytest.mark.world_size(2)
def test_autocast_reduces_half_values_in_float32(world_size):
    torch.manual_seed(0)
    oracle = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(oracle))
    whole = torch.randn(6, 3, 12, 12) + 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entered = oracle[0](whole)
        y = model(own_part(whole, SIZES))
    expected = oracle[1](entered.float())
    assert entered.dtype == y.dtype == torch.bfloat16
    assert_close(y.float(), own_part(expected, SIZES), 1e-2, "output")
    # bfloat16 statistics would be off by 4e-3
    assert_close(model[1].running_mean, oracle[1].running_mean, 1e-5, "running_mean")
    assert_close(model[1].running_var, oracle[1].running_var, 1e-5, "running_var")
    y.float().square().sum().backward()
    expected.square().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32
    assert_close(_summed(model[1].weight.grad), oracle[1].weight.grad, 2e-2, "weight")


@pytest.mark.world_size(2, 4)
def test_a_float32_step_of_ddp_is_that_of_one_process(world_size):
    torch.manual_seed(1)
    oracle = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(oracle)))
    x, target = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    sizes = [8 // world_size] * world_size
    loss = nn.functional.cross_entropy(oracle(x), target)
    own_loss = nn.functional.cross_entropy(model(own_part(x, sizes)), own_part(target, sizes))
    loss.backward()
    own_loss.backward()
    assert_close(_summed(own_loss.detach()) / world_size, loss.detach(), 1e-4, "loss")
    for name, parameter in model.module.named_parameters():
        assert_close(parameter.grad, oracle.get_parameter(name).grad, 1e-4, name)
    for name, buffer in model.module.named_buffers():
        assert_close(buffer.float(), oracle.get_buffer(name).float(), 1e-4, name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_values_too_large_to_square_are_refused_by_name(world_size, dtype):
    layer = syncbn.SyncBatchNorm(3)
    layer.layer_name = "stem.bn"
    x = torch.full((4, 3), 1e30 if dist.get_rank() == 1 else 1.0, dtype=dtype)
    x[0] *= -1
    with pytest.raises(syncbn.NonFiniteStatistics, match=r"'stem.bn': .*too large input on rank 1"):
        layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert layer.num_batches_tracked == 0
