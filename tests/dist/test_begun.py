"""Layers that are begun together: the numbers of layers that are called, with fewer exchanges and less waiting."""

import weakref

import pytest
import torch
import torch.distributed as dist
from counting import by_way, counting
from oracle import assert_close, batch_norm, own_part
from siblings import CHANNELS, inputs_of, siblings
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.norm import shared, wire
from syncbn.norm.exchange import BACKWARD, FORWARD, exchange_of
from syncbn.norm.observed import observe

needs_memory = pytest.mark.skipif(
    shared._native() is None, reason="the native library is not built: there is no shared memory"
)
over_sockets = by_way("sockets")  # between ranks that share memory layers are called one by one
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


@over_sockets
@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_begun_together_give_the_bits_of_layers_called(world_size, dtype, layout, masked):
    inputs = inputs_of(world_size, dtype, layout)
    mask = _mask(inputs[0]) if masked else None
    called = _results(siblings(dtype), inputs, False, mask)
    begun = _results(siblings(dtype), inputs, True, mask)
    for number, (ours, expected) in enumerate(zip(begun, called, strict=True)):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected), number


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("way", [pytest.param("shared", marks=needs_memory), "sockets", "gloo"])
def test_they_do_so_whatever_brings_the_values(world_size, way):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", way)
        inputs, group = inputs_of(world_size), dist.new_group(list(range(world_size)))
        begun = _results(siblings(group=group), inputs, True)
    called = _results(siblings(), inputs, False)
    assert all(torch.equal(*pair) for pair in zip(begun, called, strict=True))


@pytest.mark.world_size(2, 3)
def test_where_sums_are_reduced_they_are_those_of_all_ranks(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(wire, "GATHER_BYTES", 64)
        monkeypatch.setenv("SYNCBN_EXCHANGE", "gloo")
        inputs, group = inputs_of(world_size), dist.new_group(list(range(world_size)))
        begun = _results(siblings(group=group), inputs, True)
    called = _results(siblings(), inputs, False)
    for number, (ours, expected) in enumerate(zip(begun, called, strict=True)):
        assert_close(ours, expected, 1e-5, str(number))


@over_sockets
@pytest.mark.world_size(2)
def test_they_meet_the_other_ranks_once_each_way_under_one_name(world_size):
    inputs, told = inputs_of(world_size), []
    observe(lambda *what: told.append(what))
    try:
        _results(siblings(), inputs, True)
    finally:
        observe(None)
    values = sum(2 + 2 * channels for channels in CHANNELS)
    name = "b.{main, side.1}"
    assert [what[:3] for what in told] == [
        (name, FORWARD, 4 * values),
        (name, BACKWARD, 4 * (values - 4)),
    ]
    counted = counting()
    _results(siblings(), inputs, True)
    assert counted == [FORWARD, BACKWARD]


@needs_memory
@pytest.mark.world_size(2)
def test_ranks_that_share_memory_call_layers_one_by_one(world_size):
    inputs = inputs_of(world_size)
    expected = _results(siblings(), inputs, False)
    assert exchange_of(dist.group.WORLD).memory is not None
    counted = counting()
    begun = _results(siblings(), inputs, True)
    assert counted == [FORWARD, FORWARD, BACKWARD, BACKWARD]
    assert all(torch.equal(*pair) for pair in zip(begun, expected, strict=True))


@over_sockets
@pytest.mark.world_size(2)
def test_what_lies_between_is_done_while_the_exchange_is_under_way(world_size):
    """The exchange of the backward pass begins before, and is waited for after, what lies between in the graph."""
    happened, exchange = [], exchange_of(dist.group.WORLD)
    a, b, residual, dys = inputs_of(world_size)
    layers = siblings()
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


@over_sockets
@pytest.mark.world_size(2, 3)
def test_any_layer_may_exchange_while_others_are_begun(world_size):
    """Exchanges follow one another in the order in which they begin, whichever is waited for first."""
    inputs = inputs_of(world_size)
    a, b, residual, dys = inputs
    expected = _results(siblings(), inputs, False)
    layers, other = siblings(), syncbn.SyncBatchNorm(3)
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


@over_sockets
@pytest.mark.world_size(2)
def test_layers_of_other_groups_and_dtypes_exchange_apart(world_size):
    a, b, *_ = inputs_of(world_size)
    apart = siblings()
    apart[1].process_group = dist.new_group(list(range(world_size)))
    half = [siblings()[0], siblings(torch.bfloat16)[1]]
    counted = counting()
    for layers, inputs, expected in ((apart, (a, b), 1), (half, (a, b.bfloat16()), 2)):
        counted.clear()
        begun = syncbn.begin_norms(*zip(layers, inputs, strict=True))
        outputs = [one.finish() for one in begun]
        assert len(counted) == expected  # in the group of all ranks
        for output, layer, x in zip(outputs, layers, inputs, strict=True):
            assert torch.equal(output, layer(x))


@over_sockets
@pytest.mark.world_size(2)
def test_inputs_without_gradients_and_outputs_that_nobody_uses(world_size):
    a, b, residual, (da, db) = inputs_of(world_size)
    fixed = b.detach()
    expected = siblings()
    main = expected[0](a)
    called = torch.autograd.grad(main, (a, expected[0].weight), da)
    layers = siblings()
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


@over_sockets
@pytest.mark.world_size(2)
def test_a_graph_that_is_kept_gives_its_gradients_again(world_size):
    a, b, _, dys = inputs_of(world_size)
    layers = siblings()
    begun = syncbn.begin_norms((layers[0], a), (layers[1], b))
    outputs = [one.finish() for one in begun]
    weights = [layer.weight for layer in layers]
    first = torch.autograd.grad(outputs, (a, b, *weights), dys, retain_graph=True)
    torch.autograd.grad(outputs, weights, dys, retain_graph=True)  # wants no gradient of an input
    for used in (0, 1):
        parts = outputs[used], (a, b), dys[used]
        gradients = torch.autograd.grad(*parts, retain_graph=True, allow_unused=True)
        assert torch.equal(gradients[used], first[used])
        assert gradients[1 - used] is None
        torch.autograd.grad(outputs[used], weights[used], dys[used], retain_graph=True)
    second = torch.autograd.grad(outputs, (a, b, *weights), dys)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@over_sockets
@pytest.mark.world_size(2)
def test_a_residual_of_another_dtype_is_added_as_by_a_layer_that_is_called(world_size):
    a, b, residual, _ = inputs_of(world_size)
    layers, expected = siblings(), siblings()
    first, second = syncbn.begin_norms((layers[0], a), (layers[1], b))
    assert torch.equal(first.finish(residual.double()), expected[0](a, residual=residual.double()))
    assert torch.equal(second.finish(), expected[1](b))


@over_sockets
@pytest.mark.world_size(2)
@pytest.mark.parametrize("number", [1, 2])
def test_whoever_is_given_a_gradient_may_change_it_and_its_parameter_at_once(world_size, number):
    """As optimisers do that step within the backward pass: inputs get their gradients after that."""
    a, b, _, dys = inputs_of(world_size)
    results = []
    for begin in (False, True):
        layers = siblings()[:number]

        def step(parameter):
            with torch.no_grad():
                parameter.sub_(parameter.grad)
                parameter.grad.zero_()

        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.register_post_accumulate_grad_hook(step)
        xs = [x.detach().clone().requires_grad_() for x in (a, b)[:number]]
        if begin:
            outputs = [one.finish() for one in syncbn.begin_norms(*zip(layers, xs, strict=True))]
        else:
            outputs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
        torch.autograd.backward(outputs, dys[:number])
        results.append([x.grad for x in xs])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@over_sockets
@pytest.mark.world_size(2)
def test_passes_that_want_no_input_gradient_leave_nothing_behind(world_size):
    a, b, _, dys = inputs_of(world_size, torch.float64)
    layers = siblings(torch.float64, acts=(None, None))
    outputs = [one.finish() for one in syncbn.begin_norms((layers[0], a), (layers[1], b))]
    expected = torch.autograd.grad(outputs, (a, b), dys, retain_graph=True)
    torch.autograd.grad(outputs, [layer.weight for layer in layers], dys, retain_graph=True)
    again = torch.autograd.grad(outputs, (a, b), dys, create_graph=True)
    for ours, theirs in zip(again, expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    x = a + 1
    kept = weakref.ref(x)
    outputs = [one.finish() for one in syncbn.begin_norms((layers[0], x), (layers[1], b))]
    del x
    torch.autograd.grad(outputs, [layer.weight for layer in layers], dys)
    assert kept() is None


@over_sockets
@pytest.mark.world_size(2)
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_forward_pre_hook"])
def test_layers_whose_hooks_look_at_inputs_or_gradients_are_called(world_size, hook):
    a, b, *_ = inputs_of(world_size)
    layers, seen = siblings(), []
    getattr(layers[0], hook)(lambda layer, *given: seen.append(given))
    expected = siblings()
    begun = syncbn.begin_norms((layers[0], a), (layers[1], b))
    for one, layer, x in zip(begun, expected, (a, b), strict=True):
        y = one.finish()
        assert torch.equal(y, layer(x))
        y.sum().backward()
    assert len(seen) == 1


@over_sockets
@pytest.mark.world_size(2)
def test_second_derivatives_are_those_of_layers_called(world_size):
    a, b, residual, dys = inputs_of(world_size, torch.float64)
    results = []
    for begin in (False, True):
        layers = siblings(torch.float64, acts=("silu", None))
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


@over_sockets
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


@over_sockets
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


@over_sockets
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
