"""DistributedDataParallel in each of its modes trains a converted model as one process trains on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, own_part
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncbn

SIZES = {2: (5, 3), 3: (4, 1, 3)}
MODES = [
    {"broadcast_buffers": True},
    {"broadcast_buffers": False},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
]


class Net(nn.Module):
    """A small network with a branch that only some steps use."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6 * 16, 4)
        self.use_side = True

    def forward(self, x):
        x = self.body(x)
        if self.use_side:
            x = x + self.side(x)
        return self.head(x.flatten(1))


def _model():
    torch.manual_seed(1)
    return Net().double()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def _backward(model, x, target, scale):
    (cross_entropy(model(x), target, reduction="sum") * scale).backward()


def _pair(**options):
    """The oracle and the wrapped, converted model, each with its optimizer."""
    oracle = _model()
    wrapped = DistributedDataParallel(
        syncbn.convert_sync_batchnorm(copy.deepcopy(oracle)), **options
    )
    return [(m, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)) for m in (oracle, wrapped)]


def _step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def _assert_same(wrapped, oracle):
    for name, value in wrapped.module.state_dict().items():
        assert_close(value.double(), oracle.state_dict()[name].double(), 1e-9, name)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_mode_follows_one_process(world_size, options):
    (oracle, reference), (wrapped, optimizer) = _pair(**options)
    sizes = SIZES[world_size]
    for step in range(4):
        if "find_unused_parameters" in options:
            oracle.use_side = wrapped.module.use_side = step % 2 == 0
        x, target = _batch(step)
        _backward(oracle, x, target, 1 / 8)
        _backward(wrapped, own_part(x, sizes), own_part(target, sizes), world_size / 8)
        _step(reference)
        _step(optimizer)
    _assert_same(wrapped, oracle)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("options", MODES[:4:3], ids=str)
def test_accumulated_gradients_are_those_of_one_process_that_accumulates(world_size, options):
    (oracle, reference), (wrapped, optimizer) = _pair(**options)
    sizes = SIZES[world_size]
    for step in range(2):
        micro = [_batch(3 * step + part) for part in range(3)]
        for x, target in micro:
            _backward(oracle, x, target, 1 / 24)
        with wrapped.no_sync():
            for x, target in micro[:-1]:
                _backward(wrapped, own_part(x, sizes), own_part(target, sizes), world_size / 24)
        x, target = micro[-1]
        _backward(wrapped, own_part(x, sizes), own_part(target, sizes), world_size / 24)
        _step(reference)
        _step(optimizer)
    _assert_same(wrapped, oracle)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("ignore", [False, True])
def test_identical_buffers_are_not_broadcast_and_others_are(world_size, ignore):
    model = syncbn.convert_sync_batchnorm(_model())
    model.register_buffer("phase", torch.zeros(()))
    names = syncbn.ddp_buffers_to_ignore(model)
    assert len(names) == 6
    if ignore:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    for buffer in model.buffers():
        buffer.fill_(dist.get_rank())
    wrapped.eval()(_batch(0)[0])  # evaluation changes no buffer, so that what was broadcast shows
    assert model.phase == 0
    assert model.body[1].running_mean[0] == (dist.get_rank() if ignore else 0)


@pytest.mark.world_size(2)
def test_only_statistics_over_all_ranks_are_identical(world_size):
    model = nn.ModuleDict(
        {
            "all": syncbn.SyncBatchNorm(3),
            "pairs": syncbn.SyncBatchNorm(3, process_group=2),
            "own": syncbn.SyncBatchNorm(3, process_group=1),
            "local": nn.BatchNorm1d(3),
            "bare": syncbn.SyncBatchNorm(3, track_running_stats=False),
        }
    )
    model["all"].register_buffer("extra", torch.zeros(1))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected = [f"{layer}.{name}" for layer in ("all", "pairs") for name in statistics]
    assert syncbn.ddp_buffers_to_ignore(model) == expected
    assert syncbn.ddp_buffers_to_ignore(model["all"]) == list(statistics)


@pytest.mark.world_size(2)
def test_a_wrapped_model_can_be_converted_and_reverted_inside(world_size):
    oracle = _model()
    wrapped = DistributedDataParallel(copy.deepcopy(oracle), broadcast_buffers=False)
    syncbn.convert_sync_batchnorm(wrapped, strict=True)
    x, target = _batch(0)
    _backward(oracle, x, target, 1 / 8)
    _backward(wrapped, own_part(x, (5, 3)), own_part(target, (5, 3)), world_size / 8)
    for name, parameter in oracle.named_parameters():
        assert_close(wrapped.module.get_parameter(name).grad, parameter.grad, 1e-9, name)
    _assert_same(wrapped, oracle)
    syncbn.revert_sync_batchnorm(wrapped)
    assert type(wrapped.module.body[1]) is nn.BatchNorm2d
    _backward(wrapped, x, target, 1)
