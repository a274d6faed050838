"""Replays in backward passes of every form: repeated, partial, differentiated, inside a forward pass."""

import functools

import pytest
import torch
import torch.distributed as dist
from checkpointed_regions import REGIONS, Megatron, non_reentrant
from counting import by_way, counting
from oracle import assert_close
from test_recompute import STEPS, assert_same, batches, block
from torch import nn
from torch.utils.checkpoint import GraphExecGroup, checkpoint

import syncbn

BOTH = {"non_reentrant": non_reentrant, "megatron": Megatron.apply}


def twice(losses):
    total = sum(losses)
    total.backward(retain_graph=True)
    total.backward()


def one_by_one(losses):
    for loss in reversed(losses):
        loss.backward()


ONCE = {"composable", "debugged", *(kind for kind in REGIONS if "selective" in kind)}
"""Kinds that torch lets replay once."""


@pytest.mark.world_size(2)
@pytest.mark.parametrize("backward", [twice, one_by_one], ids=["twice", "one_by_one"])
@pytest.mark.parametrize("kind", sorted(set(REGIONS) - ONCE))
def test_backward_passes_over_the_same_and_over_other_regions(world_size, kind, backward):
    assert_same(REGIONS[kind], block, lambda: batches(equal=True), backward)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", sorted(REGIONS))
def test_a_rank_without_samples_replays_too(world_size, kind):
    assert_same(REGIONS[kind], block, lambda: batches(equal=False, empty=True))


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "kind", sorted(set(REGIONS) - {"without_rng_state", "reentrant_without_rng_state"})
)
def test_random_layers_before_the_norm_are_replayed(world_size, kind):
    if "megatron" in kind or kind in ("self_named", "derived"):
        return  # these restore no random numbers
    assert_same(REGIONS[kind], lambda: block(random=True), lambda: batches(equal=True))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("reentrantly", [True, False])
def test_other_random_numbers_in_the_replay_change_no_statistics(world_size, reentrantly):
    net, plain, inputs = block(random=True), block(random=True), batches(equal=True)
    counted = counting()
    for run in (
        lambda net, x: net(x),
        functools.partial(checkpoint, use_reentrant=reentrantly, preserve_rng_state=False),
    ):
        torch.manual_seed(3)
        model = plain if not counted else net
        sum(run(model, x).sum() for x in inputs).backward()
    assert len(counted) == 2 * 4 * STEPS
    for (name, mine), expected in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert_close(mine, expected, 1e-12, name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["non_reentrant", "nested", "offloaded_inside"])
def test_the_gradient_of_a_part_of_the_graph(world_size, kind):
    counted, found = counting(), []
    for region in (lambda net, x: net(x), REGIONS[kind]):
        counted.clear()
        net, inputs = block(), batches(equal=True)
        outputs = [region(net, x) for x in inputs]
        last = torch.autograd.grad(outputs[-1].pow(3).sum(), [inputs[-1], net[0].weight])
        first = torch.autograd.grad(outputs[0].pow(3).sum(), [inputs[0]])
        found.append([*last, *first, *net.buffers(), torch.tensor(float(len(counted)))])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 1e-11)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["non_reentrant", "nested", "without_early_stop"])
def test_second_derivatives_through_a_replay(world_size, kind):
    counted, found = counting(), []
    for region in (lambda net, x: net(x), REGIONS[kind]):
        counted.clear()
        net, inputs = block(), batches(equal=True)
        losses = [region(net, x).pow(3).sum() for x in inputs]
        gradients = torch.autograd.grad(sum(losses), inputs, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        parameters = [p.grad for p in net.parameters() if p.grad is not None]
        found.append([*(x.grad for x in inputs), *parameters, *net.buffers()])
        found[-1].append(torch.tensor(float(len(counted))))
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 1e-9)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_backward_pass_inside_a_region(world_size, early_stop):
    def penalised(net, x):
        y = net(x)
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True)
        return net(x + 0.1 * dx.detach()) + y

    region = functools.partial(checkpoint, penalised, use_reentrant=False, early_stop=early_stop)
    found = []
    for run in (penalised, region):
        net, inputs = block(), batches(equal=True)
        for x in inputs:
            run(net, x).pow(3).sum().backward()
        found.append(
            [*(x.grad for x in inputs), *(p.grad for p in net.parameters()), *net.buffers()]
        )
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 1e-10)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("outer", ["plain", "non_reentrant", "reentrant", "megatron"])
def test_a_reentrant_region_whose_backward_pass_runs_inside_another_region(world_size, outer):
    def penalised(net, x):
        inner = x.detach().requires_grad_()
        Megatron.apply(net, inner).pow(2).sum().backward()
        return net(x + 0.1 * inner.grad)

    def run(net, x):
        with torch.enable_grad():
            return penalised(net, x)

    regions = {"plain": lambda run, *a: run(*a), **REGIONS}
    found = []
    for kind in ("plain", outer):
        net, inputs = block(), batches(equal=True)
        for x in inputs:
            region = regions[kind]
            region(functools.partial(run, net), x).pow(3).sum().backward()
        # a region adds its inner gradients once more when it is replayed: parameters are left out
        found.append([*(x.grad for x in inputs), *net.buffers()])
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 1e-10)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["plain", "non_reentrant", "reentrant", "megatron"])
def test_a_pass_in_a_hook_of_the_backward_pass_is_an_ordinary_one(world_size, kind):
    region = {"plain": lambda net, x: net(x), **REGIONS}[kind]
    net, other = block(), block()
    inputs = batches(equal=True)
    extra = torch.randn(3, 4, dtype=torch.float64) + dist.get_rank()
    net[0].weight.register_hook(lambda gradient: _ran(other, extra))
    counted = counting()
    for x in inputs:
        region(net, x).pow(3).sum().backward()
    runs = len(inputs)
    assert len(counted) == 4 * len(inputs) + 2 * runs
    assert int(net[1].num_batches_tracked) == 2 * len(inputs)
    assert int(other[1].num_batches_tracked) == 2 * runs


def _ran(net, x):
    net(x)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", sorted(BOTH))
def test_passes_in_evaluation_mode_in_between(world_size, kind):
    class Guided(nn.Module):
        """Runs its block in evaluation mode first."""

        def __init__(self):
            super().__init__()
            self.inner = block()

        def forward(self, x):
            self.inner.eval()
            guide = self.inner(x)
            self.inner.train()
            return self.inner(x) + 0 * guide.detach()

    assert_same(BOTH[kind], Guided, lambda: batches(equal=True))


@pytest.mark.world_size(2)
def test_two_backward_calls_that_share_a_replay(world_size):
    def backward(losses):
        with GraphExecGroup():
            for loss in losses:
                loss.backward()

    assert_same(non_reentrant, block, lambda: batches(equal=True), backward)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("way", ["shared", "gloo"])
@pytest.mark.parametrize("kind", ["non_reentrant", "reentrant", "selective_save_none"])
def test_the_function_form_is_recognised(world_size, kind, way):
    def run():
        counted, found = counting(), []
        for around in (lambda f, x: f(x), REGIONS[kind]):
            counted.clear()
            inputs, running = batches(equal=True), [torch.zeros(4), torch.ones(4)]
            weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
            with torch.no_grad():
                weight.fill_(1.5)
            norm = functools.partial(_function_form, weight, running)
            sum(around(norm, x).pow(3).sum() for x in inputs).backward()
            found.append([*(x.grad for x in inputs), weight.grad, *running])
            assert len(counted) == 4 * len(inputs)
        for mine, expected in zip(*found, strict=True):
            assert_close(mine, expected, 1e-11)

    by_way(way)(run)()


def _function_form(weight, running, x):
    residual = x.detach()
    y = syncbn.sync_batch_norm(x, *running, weight, residual=residual, act="silu")
    return syncbn.sync_batch_norm(y, *running, weight)
