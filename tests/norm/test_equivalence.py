"""N ranks compute what one process computes on the concatenated batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, batch_norm, forward_backward, own_part
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

SPLITS = {
    2: [(3, 3), (5, 1), (4, 0)],
    3: [(2, 2, 2), (1, 4, 2), (0, 3, 1)],
    4: [(2, 2, 2, 2), (5, 3, 2, 2), (0, 1, 0, 2)],
}
SHAPES = [(6,), (6, 5), (6, 4, 3), (6, 2, 3, 2)]


def _one_step(layer, whole, dy, sizes, bound):
    """Compare outputs, gradients and buffers of `layer` on ranks with those of one process."""
    oracle = copy.deepcopy(layer)
    y, dx = forward_backward(oracle, whole, dy)
    sync = syncbn.convert_sync_batchnorm(layer)
    own_y, own_dx = forward_backward(sync, own_part(whole, sizes), own_part(dy, sizes))
    assert_close(own_y, own_part(y, sizes), bound, "output")
    assert_close(own_dx, own_part(dx, sizes), bound, "input gradient")
    for name, parameter in sync.named_parameters():
        summed = parameter.grad.clone()
        dist.all_reduce(summed)
        assert_close(summed, oracle.get_parameter(name).grad, bound, f"gradient of {name}")
    for name, buffer in sync.named_buffers():
        assert_close(buffer.double(), oracle.get_buffer(name).double(), bound, name)


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{len(s) + 1}d")
def test_any_split_matches_one_big_batch_in_float64(world_size, shape):
    for sizes in SPLITS[world_size]:
        generator = torch.Generator().manual_seed(sum(sizes))
        whole = torch.randn(sum(sizes), *shape, generator=generator, dtype=torch.float64) * 3 + 5
        dy = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        _one_step(batch_norm(6, whole.dim()).double(), whole, dy, sizes, 1e-10)


@pytest.mark.world_size(2, 4)
@pytest.mark.parametrize(("mean", "sd", "bound"), [(0.5, 2.0, 1e-4), (100.0, 0.01, 1e-3)])
def test_float32_stays_within_its_bound_even_at_a_large_mean(world_size, mean, sd, bound):
    # float32 holds a mean of 100 to 4e-6, that is 4e-4 of a standard deviation of 0.01
    whole = torch.randn(8, 6, 9, 9) * sd + mean
    dy = torch.randn(8, 6, 9, 9)
    oracle = batch_norm(6).double()
    y, dx = forward_backward(oracle, whole.double(), dy.double())
    layer = syncbn.convert_sync_batchnorm(batch_norm(6))
    sizes = [8 // world_size] * world_size
    own_y, own_dx = forward_backward(layer, own_part(whole, sizes), own_part(dy, sizes))
    assert_close(own_y, own_part(y, sizes).float(), bound, "output")
    assert_close(own_dx, own_part(dx, sizes).float(), bound, "input gradient")
    assert_close(layer.running_var, oracle.running_var.float(), 1e-4, "running_var")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_statistics(world_size, dtype):
    whole = (torch.randn(6, 5, 7, 7) + 2).to(dtype)
    dy = torch.randn(6, 5, 7, 7).to(dtype)
    oracle = batch_norm(5)
    y, dx = forward_backward(oracle, whole.float(), dy.float())
    layer = syncbn.convert_sync_batchnorm(batch_norm(5))
    own_y, own_dx = forward_backward(layer, own_part(whole, (2, 4)), own_part(dy, (2, 4)))
    assert own_y.dtype == own_dx.dtype == dtype
    assert_close(layer.running_mean, oracle.running_mean, 1e-5, "running_mean")
    assert_close(layer.running_var, oracle.running_var, 1e-5, "running_var")
    assert_close(own_y.float(), own_part(y, (2, 4)), 1e-2, "output")
    assert_close(own_dx.float(), own_part(dx, (2, 4)), 2e-2, "input gradient")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (4, 1, 6, 7), (4, 5, 1, 1), (4, 5, 3, 6, 7)])
def test_channels_last_goes_in_and_comes_out(world_size, shape):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    layer = syncbn.convert_sync_batchnorm(batch_norm(shape[1], len(shape)))
    y = layer(x)
    dense = torch.randn(shape)  # an upstream gradient in the other format
    (dx,) = torch.autograd.grad(y, x, dense)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_in_torch(world_size, options):
    oracle = batch_norm(4, **options).double()
    layer = syncbn.convert_sync_batchnorm(copy.deepcopy(oracle))
    for step in range(3):
        whole = torch.randn(6, 4, 3, 3, dtype=torch.float64) * (step + 1)
        assert_close(layer(own_part(whole, (4, 2))), own_part(oracle(whole), (4, 2)), 1e-10)
    for name, buffer in layer.named_buffers():
        assert_close(buffer.double(), oracle.get_buffer(name).double(), 1e-10, name)


@pytest.mark.world_size(2)
def test_statistics_frozen_by_attribute_stay_frozen(world_size):
    layer = syncbn.convert_sync_batchnorm(batch_norm(4))
    layer.track_running_stats = False
    layer(torch.randn(3, 4, 2, 2) + 5)
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert layer.num_batches_tracked == 0


@pytest.mark.world_size(2)
def test_a_batch_empty_on_all_ranks_changes_nothing(world_size):
    layer = syncbn.SyncBatchNorm(4)
    layer(torch.randn(3, 4))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.empty(0, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4)
    assert x.grad.shape == (0, 4)
    assert torch.equal(layer.weight.grad, torch.zeros(4))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.world_size(2)
def test_one_value_in_total_is_refused_on_every_rank(world_size):
    layer = syncbn.SyncBatchNorm(4)
    rows = 1 if dist.get_rank() == 0 else 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(rows, 4))
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))


@pytest.mark.world_size(2)
def test_one_value_a_rank_is_enough_together(world_size):
    whole = torch.tensor([[1.0, 5.0], [3.0, -5.0]], dtype=torch.float64)
    layer = syncbn.SyncBatchNorm(2, dtype=torch.float64)
    assert_close(
        layer(own_part(whole, (1, 1))), own_part(nn.BatchNorm1d(2).double()(whole), (1, 1)), 1e-10
    )


def _model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),  # a bias before a norm has gradient 0
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10, bias=False),
        nn.BatchNorm1d(10),
        nn.Tanh(),
        nn.Linear(10, 4),
    ).double()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (12,), generator=generator)


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_twenty_ddp_steps_follow_one_process(world_size, even):
    sizes = (
        [12 // world_size] * world_size
        if even
        else {2: (8, 4), 3: (7, 0, 5), 4: (5, 3, 2, 2)}[world_size]
    )
    oracle = _model()
    sync = syncbn.convert_sync_batchnorm(copy.deepcopy(oracle))
    ranks = DistributedDataParallel(sync, broadcast_buffers=False)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (oracle, ranks)]
    for step in range(20):
        x, target = _batch(step)
        nn.functional.cross_entropy(oracle(x), target).backward()
        own = nn.functional.cross_entropy(
            ranks(own_part(x, sizes)), own_part(target, sizes), reduction="sum"
        )
        (own * world_size / len(x)).backward()  # DDP divides by W: weights the rank by W * b_w / B
        if step == 0:
            for name, parameter in sync.named_parameters():
                assert_close(parameter.grad, oracle.get_parameter(name).grad, 1e-10, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in sync.state_dict().items():
        assert_close(
            value.double(), oracle.state_dict()[name].double(), 1e-8, f"{name} after 20 steps"
        )


@pytest.mark.world_size(4)
def test_unweighted_losses_of_uneven_ranks_are_wrong_by_forty_percent(world_size):
    sizes = (5, 3, 2, 2)
    oracle = _model()
    ranks = DistributedDataParallel(syncbn.convert_sync_batchnorm(copy.deepcopy(oracle)))
    x, target = _batch(0)
    nn.functional.cross_entropy(oracle(x), target).backward()
    nn.functional.cross_entropy(ranks(own_part(x, sizes)), own_part(target, sizes)).backward()
    wrong, right = ranks.module[0].weight.grad, oracle[0].weight.grad
    assert 0.35 < (wrong - right).norm() / right.norm() < 0.45


@pytest.mark.world_size(2, 3)
def test_the_same_world_gives_the_same_bits_again_and_on_every_rank(world_size):
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for _ in range(2):
        layer = syncbn.convert_sync_batchnorm(batch_norm(6))
        y, dx = forward_backward(layer, x, x.sin())
        results.append((y, dx, layer.running_var))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    everyone = [torch.empty_like(layer.running_var) for _ in range(world_size)]
    dist.all_gather(everyone, layer.running_var)
    assert all(torch.equal(other, layer.running_var) for other in everyone)


@pytest.mark.world_size(2)
def test_wide_layers_need_more_than_one_frame_and_stay_exact(world_size):
    whole = torch.randn(6, 5000, dtype=torch.float64)
    _one_step(batch_norm(5000, 2).double(), whole, torch.randn_like(whole.sin()), (2, 4), 1e-10)


@pytest.mark.world_size(2)
def test_evaluation_communicates_nothing(world_size):
    layer = syncbn.SyncBatchNorm(3).eval()
    if dist.get_rank() == 0:  # rank 1 never comes: an exchange would wait for it
        assert layer(torch.randn(2, 3)).shape == (2, 3)
