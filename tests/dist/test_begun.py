"""Layers that are begun together: the numbers of layers that are called, with fewer exchanges and less waiting."""

import copy

import pytest
import torch
import torch.distributed as dist
from counting import counting
from oracle import assert_close, batch_norm, own_part
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.norm import wire
from syncbn.norm.exchange import BACKWARD, FORWARD, exchange_of
from syncbn.norm.observed import observe

SIZES = {2: (2, 4), 3: (3, 0, 2)}
CHANNELS = (3, 5)


def _layers(dtype=torch.float32, group=None, acts=("relu", None), names=("b.main", "b.side.1")):
    """Two layers that could be siblings, named as a conversion names them."""
    torch.manual_seed(1)
    layers = []
    for channels, act, name in zip(CHANNELS, acts, names, strict=True):
        layer = syncbn.convert_sync_batchnorm(batch_norm(channels).to(dtype), group)
        layer.act, layer.layer_name = act, name
        layers.append(layer)
    return layers


def _inputs(world_size, dtype=torch.float32, layout=torch.contiguous_format):
    """This rank's inputs, a residual for the first, and upstream gradients."""
    generator = torch.Generator().manual_seed(7)
    total = sum(SIZES[world_size])
    wholes = [
        torch.randn(total, channels, 4, 6, generator=generator).to(dtype, memory_format=layout)
        for channels in (*CHANNELS, CHANNELS[0], *CHANNELS)
    ]
    a, b, residual, *dys = (own_part(whole, SIZES[world_size]) for whole in wholes)
    return a.requires_grad_(), b.requires_grad_(), residual.requires_grad_(), dys


def _mask(x):
    generator = torch.Generator().manual_seed(int(x.shape[0]))
    return torch.rand(x.shape[0], 1, 4, 6, generator=generator) < 0.7


def _results(layers, inputs, begin, mask=None):
    a, b, residual, dys = inputs
    if begin:
        first, second = syncbn.begin_norms((layers[0], a, mask), (layers[1], b))
        side = second.finish()  # in the other order than they were begun
        main = first.finish(residual)
    else:
        main, side = layers[0](a, mask, residual), layers[1](b)
    wanted = (a, b, residual, *(p for layer in layers for p in layer.parameters()))
    gradients = torch.autograd.grad((main, side), wanted, dys)
    return [main, side, *gradients, *(buffer for layer in layers for buffer in layer.buffers())]


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_begun_together_give_the_bits_of_layers_called(world_size, dtype, layout, masked):
    inputs = _inputs(world_size, dtype, layout)
    mask = _mask(inputs[0]) if masked else None
    called = _results(_layers(dtype), inputs, False, mask)
    begun = _results(_layers(dtype), inputs, True, mask)
    for number, (ours, expected) in enumerate(zip(begun, called, strict=True)):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected), number


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("way", ["shared", "sockets", "gloo"])
def test_they_do_so_whatever_brings_the_values(world_size, way):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", way)
        inputs, group = _inputs(world_size), dist.new_group(list(range(world_size)))
        begun = _results(_layers(group=group), inputs, True)
    called = _results(_layers(), inputs, False)
    assert all(torch.equal(*pair) for pair in zip(begun, called, strict=True))


@pytest.mark.world_size(2, 3)
def test_where_sums_are_reduced_they_are_those_of_all_ranks(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(wire, "GATHER_BYTES", 64)
        monkeypatch.setenv("SYNCBN_EXCHANGE", "gloo")
        inputs, group = _inputs(world_size), dist.new_group(list(range(world_size)))
        begun = _results(_layers(group=group), inputs, True)
    called = _results(_layers(), inputs, False)
    for number, (ours, expected) in enumerate(zip(begun, called, strict=True)):
        assert_close(ours, expected, 1e-5, str(number))


@pytest.mark.world_size(2)
def test_they_meet_the_other_ranks_once_each_way_under_one_name(world_size):
    inputs, told = _inputs(world_size), []
    observe(lambda *what: told.append(what))
    try:
        _results(_layers(), inputs, True)
    finally:
        observe(None)
    values = sum(2 + 2 * channels for channels in CHANNELS)
    name = "b.{main, side.1}"
    assert [what[:3] for what in told] == [
        (name, FORWARD, 4 * values),
        (name, BACKWARD, 4 * (values - 4)),
    ]
    counted = counting()
    _results(_layers(), inputs, True)
    assert counted == [FORWARD, BACKWARD]


@pytest.mark.world_size(2)
def test_what_lies_between_is_done_while_the_exchange_is_under_way(world_size):
    """The exchange of the backward pass begins before, and is waited for after, what lies between in the graph."""
    happened, exchange = [], exchange_of(dist.group.WORLD)
    a, b, residual, dys = _inputs(world_size)
    layers = _layers()
    _results(layers, (a, b, residual, dys), True)  # the ranks have met
    transport = exchange._transport
    begin = transport.begin

    def noted(*arguments):
        happened.append("begun")
        finish = begin(*arguments)

        def ended():
            happened.append("waited")
            return finish()

        return ended

    transport.begin = noted
    try:
        first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
        happened.append("between")
        weight = torch.ones(3, 1, 1, requires_grad=True)
        between = residual * weight
        between.register_hook(lambda _: happened.append("between, backwards"))
        main, side = first.finish(between), second.finish()
        assert happened == ["begun", "between", "waited"]
        happened.clear()
        torch.autograd.backward((main, side), dys)
    finally:
        transport.begin = begin
    assert happened == ["begun", "between, backwards", "waited"]
    assert weight.grad is not None


@pytest.mark.world_size(2, 3)
def test_any_layer_may_exchange_while_others_are_begun(world_size):
    """Exchanges follow one another in the order in which they begin, whichever is waited for first."""
    inputs = _inputs(world_size)
    a, b, residual, dys = inputs
    expected = _results(_layers(), inputs, False)
    layers, other = _layers(), syncbn.SyncBatchNorm(3)
    (first,) = syncbn.begin_norms((layers[0], a))
    other(a)
    (second,) = syncbn.begin_norms((layers[1], b))
    other(a + 1)
    side, main = second.finish(), first.finish(residual)
    wanted = (a, b, residual, *(p for layer in layers for p in layer.parameters()))
    gradients = torch.autograd.grad((main, side), wanted, dys)
    buffers = (buffer for layer in layers for buffer in layer.buffers())
    ours = [main, side, *gradients, *buffers]
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.world_size(2)
def test_layers_of_other_groups_and_dtypes_exchange_apart(world_size):
    a, b, *_ = _inputs(world_size)
    apart = _layers()
    apart[1].process_group = dist.new_group(list(range(world_size)))
    half = [_layers()[0], _layers(torch.bfloat16)[1]]
    counted = counting()
    for layers, inputs, expected in ((apart, (a, b), 1), (half, (a, b.bfloat16()), 2)):
        counted.clear()
        begun = syncbn.begin_norms(*zip(layers, inputs, strict=True))
        outputs = [one.finish() for one in begun]
        assert len(counted) == expected  # in the group of all ranks
        for output, layer, x in zip(outputs, layers, inputs, strict=True):
            assert torch.equal(output, layer(x))


@pytest.mark.world_size(2)
def test_inputs_without_gradients_and_outputs_that_nobody_uses(world_size):
    a, b, residual, (da, db) = _inputs(world_size)
    fixed = b.detach()
    expected = _layers()
    main = expected[0](a)
    called = torch.autograd.grad(main, (a, expected[0].weight), da)
    layers = _layers()
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], fixed))
    main, side = first.finish(), second.finish()
    begun = torch.autograd.grad((main, side), (a, layers[0].weight, layers[1].weight), (da, db))
    assert all(torch.equal(*pair) for pair in zip(begun, called, strict=False))
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
    main, _ = first.finish(), second.finish()
    dx, nothing = torch.autograd.grad(main, (a, b), da, allow_unused=True)
    assert torch.equal(dx, called[0])
    assert nothing is None
    with torch.no_grad():
        first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
        assert torch.equal(first.finish(residual), layers[0](a, residual=residual))
        assert not second.finish().requires_grad


@pytest.mark.world_size(2)
def test_a_graph_that_is_kept_gives_its_gradients_again(world_size):
    a, b, _, dys = _inputs(world_size)
    layers = _layers()
    begun = syncbn.begin_norms((layers[0], a), (layers[1], b))
    outputs = [one.finish() for one in begun]
    weights = [layer.weight for layer in layers]
    first = torch.autograd.grad(outputs, (a, b, *weights), dys, retain_graph=True)
    torch.autograd.grad(outputs, weights, dys, retain_graph=True)  # wants no gradient of an input
    second = torch.autograd.grad(outputs, (a, b, *weights), dys)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.world_size(2)
def test_second_derivatives_are_those_of_layers_called(world_size):
    a, b, residual, dys = _inputs(world_size, torch.float64)
    results = []
    for begin in (False, True):
        layers = _layers(torch.float64, acts=("silu", None))
        if begin:
            first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
            outputs = first.finish(residual), second.finish()
        else:
            outputs = layers[0](a, residual=residual), layers[1](b)
        first_order = torch.autograd.grad(outputs, (a, b), dys, create_graph=True)
        # of the outputs and of their gradients at once: both ways through the same nodes
        loss = sum(g.square().sum() for g in first_order) + sum(y.pow(3).sum() for y in outputs)
        wanted = (a, b, residual, layers[0].weight)
        results.append([*first_order, *torch.autograd.grad(loss, wanted)])
    for number, (called, begun) in enumerate(zip(*results, strict=True)):
        assert_close(begun, called, 1e-12, str(number))


class _Block(nn.Module):
    """A residual block whose last norm and whose shortcut's are siblings."""

    def __init__(self, begin):
        super().__init__()
        torch.manual_seed(11)
        self.begin = begin
        self.conv, self.shortcut = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.side = batch_norm(4), batch_norm(4)

    def forward(self, x):
        if not self.begin:
            return torch.relu(self.norm(self.conv(x)) + self.side(self.shortcut(x)))
        main, side = syncbn.begin_norms((self.norm, self.conv(x)), (self.side, self.shortcut(x)))
        return torch.relu(main.finish(residual=side.finish()))


def _network(begin):
    return nn.Sequential(_Block(begin), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.world_size(2)
def test_ddp_steps_follow_one_process_on_the_whole_batch(world_size):
    whole, target = torch.randn(3, 6, 3, 5, 5).double(), torch.randn(3, 6, 2).double()
    sizes = (3, 3)
    alone = _network(False).double()
    ours = syncbn.convert_sync_batchnorm(_network(True).double())
    ours = DistributedDataParallel(ours, broadcast_buffers=False)
    for model, part in ((alone, lambda t: t), (ours, lambda t: own_part(t, sizes))):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in zip(whole, target, strict=True):
            optimiser.zero_grad()
            (model(part(x)) - part(y)).square().sum(1).mean().backward()
            optimiser.step()
    for (name, mine), expected in zip(
        ours.module.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert_close(mine, expected, 1e-10, name)


@pytest.mark.world_size(2)
def test_a_checkpointed_pass_neither_exchanges_nor_counts_again(world_size):
    parts = [own_part(whole, (2, 4)) for whole in torch.randn(2, 6, 3, 5, 5)]
    plain, replayed = (syncbn.convert_sync_batchnorm(_network(begin)) for begin in (False, True))
    for part in parts:
        plain(part).square().sum().backward()
    counted = counting()
    losses = [checkpoint(replayed, part, use_reentrant=False).square().sum() for part in parts]
    for loss in losses:
        loss.backward()
    assert counted == [FORWARD] * 2 + [BACKWARD] * 2
    for (name, a), b in zip(replayed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), b in zip(replayed.named_parameters(), plain.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-6, name)


@pytest.mark.world_size(2)
def test_a_model_that_begins_its_norms_compiles_without_a_graph_break(world_size):
    plain, begun = (syncbn.convert_sync_batchnorm(_Block(begin)) for begin in (False, True))
    compiled = torch.compile(begun, fullgraph=True, backend="aot_eager")
    x = own_part(torch.randn(6, 3, 5, 5), (2, 4))
    for training in (True, False):
        outputs = [net.train(training)(x) for net in (plain, compiled)]
        assert_close(outputs[1], outputs[0], 1e-6)
    for (name, a), b in zip(begun.named_buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-6, name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("second", [True, False])
def test_ranks_that_begin_other_layers_disagree(world_size, second):
    a, b, *_ = _inputs(world_size)
    layers = _layers(names=("", "")) if second else _layers()
    other = copy.deepcopy(layers[1])
    rank = dist.get_rank()
    if second:  # without names, at the second meeting
        other = syncbn.SyncBatchNorm(CHANNELS[1])
        for _ in range(2):
            for one in syncbn.begin_norms((layers[0], a), (layers[1], b), (other, b)):
                one.finish()
    else:
        other.layer_name = "elsewhere"
    chosen = [(layers[1], other), (other, layers[1])][rank]
    begun = syncbn.begin_norms((layers[0], a), *((layer, b) for layer in chosen))
    with pytest.raises(syncbn.RanksDisagree, match=r"rank 0 is in.*rank 1 is in|rank 1 is.*rank 0"):
        begun[0].finish()


@pytest.mark.world_size(2)
def test_bad_input_on_one_rank_is_an_error_on_all(world_size):
    a, b, *_ = _inputs(world_size)
    layers = _layers()
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="expected 5 channels, got 3"):
            syncbn.begin_norms((layers[0], a), (layers[1], a))
    else:
        begun = syncbn.begin_norms((layers[0], a), (layers[1], b))
        with pytest.raises(syncbn.RanksDisagree, match=r"rank 0 failed in b\.side\.1: expected 5"):
            begun[1].finish()


@pytest.mark.world_size(2)
def test_what_changed_since_it_began_is_refused(world_size):
    a, b, residual, _ = _inputs(world_size)
    layers = _layers()

    def begun():
        return syncbn.begin_norms((layers[0], a), (layers[1], b))[0]

    one = begun()
    one.finish()
    with pytest.raises(RuntimeError, match=r"b\.\{main, side.1\}: finish\(\) was called twice"):
        one.finish()
    one = begun()
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="no longer the one that was begun with"):
        one.finish()
    one = begun()
    hook = layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with pytest.raises(RuntimeError, match="no longer the one that was begun with"):
        one.finish()
    hook.remove()
    one = begun()
    layers[0].eval()
    with pytest.raises(RuntimeError, match="begun in training mode, finished in eval mode"):
        one.finish()
    layers[0].train()
    assert torch.equal(begun().finish(residual), layers[0](a, residual=residual))


@pytest.mark.world_size(2)
def test_hooks_of_a_layer_see_its_input_and_output(world_size):
    a, b, *_ = _inputs(world_size)
    layers, seen = _layers(), []
    layers[0].register_forward_hook(lambda layer, args, y: seen.append((layer, *args, y)))
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
    y = first.finish()
    second.finish()
    assert [len(call) for call in seen] == [3]
    assert all(got is given for got, given in zip(seen[0], (layers[0], a, y), strict=True))
