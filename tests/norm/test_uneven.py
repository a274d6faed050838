"""Ranks with unequal numbers of batches: `join` around DistributedDataParallel, and `in_lockstep` around a loader."""

import copy
from collections import UserDict

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import syncbn

STEPS = {2: (4, 2), 3: (2, 0, 5)}
"""Batches of three samples a rank."""
MODES = [
    {},
    {"broadcast_buffers": False},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
]


def _model():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5, bias=False),
        nn.BatchNorm1d(5),
        nn.Linear(5, 4),
    ).double()


def _batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (3,), generator=generator)


def _own(world_size):
    return [_batch(dist.get_rank(), step) for step in range(STEPS[world_size][dist.get_rank()])]


def _loss(model, x, target, world_size, total):
    return cross_entropy(model(x), target, reduction="sum") * world_size / total


def _optimizer(model):
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def _in_one_process(world_size):
    """The model after all steps, each over what the ranks together hold of it."""
    model = _model()
    optimizer = _optimizer(model)
    for step in range(max(STEPS[world_size])):
        ready = [rank for rank in range(world_size) if step < STEPS[world_size][rank]]
        x, target = (
            torch.cat(part) for part in zip(*(_batch(r, step) for r in ready), strict=True)
        )
        optimizer.zero_grad()
        cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def _active(world_size, step):
    return sum(step < steps for steps in STEPS[world_size])


def _assert_same(model, expected, bound=1e-9):
    for name, value in model.state_dict().items():
        assert_close(value.double(), expected.state_dict()[name].double(), bound, name)


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_join_trains_as_one_process_does_on_what_is_left(world_size, options):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()), **options)
    optimizer = _optimizer(model)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    with syncbn.join(model, step):
        for number, (x, target) in enumerate(_own(world_size)):
            _loss(model, x, target, world_size, 3 * _active(world_size, number)).backward()
            step()
    expected = _in_one_process(world_size)
    _assert_same(model.module, expected)
    momenta = [optimizer.state[p]["momentum_buffer"].sum() for p in model.parameters()]
    everyone = [None] * world_size
    dist.all_gather_object(everyone, momenta)
    assert all(other == everyone[0] for other in everyone)


@pytest.mark.world_size(2)
def test_join_without_a_step_still_leaves_the_same_model_everywhere(world_size):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()))
    optimizer = SGD(model.parameters(), lr=0.1)
    with syncbn.join(model):
        for x, _ in _own(world_size):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    everyone = [None] * world_size
    dist.all_gather_object(everyone, [value.clone() for value in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*everyone, strict=True))


@pytest.mark.world_size(2)
def test_join_follows_accumulation_and_passes_without_gradients(world_size):
    def train(count, rank):
        model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()))
        optimizer = SGD(model.parameters(), lr=0.1)
        with syncbn.join(model, optimizer.step):
            for number in range(count):
                x, _ = _batch(rank, number)
                with torch.no_grad():
                    model(x)
                with model.no_sync():
                    model(x).square().mean().backward()
                model(x.flip(0)).square().mean().backward()
                optimizer.step()
        return model.module

    rank = dist.get_rank()
    uneven = train(3 if rank == 0 else 1, rank)
    everyone = [None] * world_size
    dist.all_gather_object(everyone, [value.clone() for value in uneven.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*everyone, strict=True))
    assert uneven[1].num_batches_tracked == 9


@pytest.mark.world_size(2)
def test_join_repeats_steps_in_the_autocast_state_they_had(world_size):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model().float()))
    with syncbn.join(model):
        for x, _ in _own(world_size):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = model(x.float())
            y.float().square().mean().backward()
    assert model.module[1].num_batches_tracked == 4


@pytest.mark.world_size(2)
def test_even_batches_in_a_join_change_nothing(world_size):
    inside, outside = (
        DistributedDataParallel(syncbn.convert_sync_batchnorm(_model())) for _ in range(2)
    )
    batches = [_batch(dist.get_rank(), step)[0] for step in range(3)]
    for x in batches:
        outside(x).square().sum().backward()
    with syncbn.join(inside):
        for x in batches:
            inside(x).square().sum().backward()
    for one, other in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert not inside._forward_pre_hooks


@pytest.mark.world_size(2)
def test_ddps_own_join_is_refused_before_anybody_waits(world_size):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()))
    x, _ = _batch(dist.get_rank(), 0)
    with (
        pytest.raises(RuntimeError, match=r"'1' inside Dist.*join\(\).*use `with syncbn\.join"),
        model.join(),
    ):
        model(x)


@pytest.mark.world_size(2)
def test_ddps_own_join_may_end_all_ranks_with_the_first(world_size):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()))

    def train():
        with model.join(throw_on_early_termination=True):
            for x, _ in _own(world_size):
                model(x).square().mean().backward()

    with pytest.raises(RuntimeError, match="exhausted"):
        train()


def test_join_wants_a_wrapped_model():
    with (
        pytest.raises(TypeError, match="model=Linear is not allowed"),
        syncbn.join(nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.world_size(2, 3)
def test_a_loop_in_lockstep_trains_as_one_process_does(world_size):
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(_model()))
    optimizer = _optimizer(model)
    seen = []
    for number, (x, target) in enumerate(syncbn.in_lockstep(_own(world_size))):
        seen.append(len(x))
        optimizer.zero_grad()
        _loss(model, x, target, world_size, 3 * _active(world_size, number)).backward()
        optimizer.step()
    own, longest = STEPS[world_size][dist.get_rank()], max(STEPS[world_size])
    assert seen == [3] * own + [0] * (longest - own)
    _assert_same(model.module, _in_one_process(world_size))


@pytest.mark.world_size(2)
def test_lockstep_keeps_form_and_flags_of_a_batch(world_size):
    x = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    batch = {"x": x, "pair": (torch.ones(2, dtype=torch.int64), "name"), "scale": torch.tensor(2.0)}
    mine = [batch, copy.copy(batch)] if dist.get_rank() == 0 else []
    *_, last = syncbn.in_lockstep(mine)
    if dist.get_rank() == 1:
        assert last["x"].shape == (0, 3)
        assert last["x"].dtype == torch.float16
        assert last["x"].requires_grad
        assert last["pair"][0].shape == (0,)
        assert last["pair"][1] == "name"
        assert last["scale"] == 2


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["array", "object"])
def test_lockstep_refuses_samples_that_it_cannot_take_out(world_size, kind):
    held = UserDict(x=torch.ones(2)) if kind == "object" else torch.ones(2).numpy()
    with pytest.raises(TypeError, match=f"a batch with a {type(held).__name__} is not allowed"):
        list(syncbn.in_lockstep([(torch.ones(2), held)]))


def test_alone_there_is_nobody_to_keep_in_step_with():
    assert list(syncbn.in_lockstep([1, 2])) == [1, 2]
