"""Activation checkpointing of every kind gives what the network gives without it, and exchanges no more."""

import copy

import pytest
import torch
import torch.distributed as dist
from checkpointed_regions import REGIONS
from counting import by_way, counting
from oracle import assert_close
from torch import nn

import syncbn

pytestmark = pytest.mark.untraced
STEPS, CHANNELS = 4, 4
BY_EVERY_WAY = ("non_reentrant", "reentrant", "megatron", "selective_save_all")
"""Kinds that `make test` runs over every transport, one of each mechanism; the others over shared memory alone."""


class Noise(nn.Module):
    """A random layer."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def block(random=False, **options):
    """A block that holds a synchronised layer twice, with a random layer before it where asked."""
    torch.manual_seed(7)
    norm = syncbn.SyncBatchNorm(CHANNELS, **options)
    layers = [nn.Linear(CHANNELS, CHANNELS), norm, nn.Tanh(), nn.Linear(CHANNELS, CHANNELS), norm]
    return nn.Sequential(*([Noise()] if random else []), *layers).double()


def batches(equal, empty=False):
    """This rank's inputs of all steps: where `equal`, the same ones on rank 0, and others on rank 1."""
    generator = torch.Generator().manual_seed(1)
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = torch.randn(2, STEPS, 5, CHANNELS, generator=generator, dtype=torch.float64)
    if equal:
        found[0] = found[0, :1]
    found = found[rank, :, :0] if empty and rank == 1 else found[rank]
    return [batch.clone().requires_grad_() for batch in found]


def trained(region, net, inputs, backward=lambda losses: sum(losses).backward()):
    """Outputs, gradients and buffers after a step in which `net` is used once for each of `inputs`."""
    nets = net if isinstance(net, list) else [net] * len(inputs)
    outputs = [region(one, x) for one, x in zip(nets, inputs, strict=True)]
    losses = [(n + 1) * y.pow(3).sum() for n, y in enumerate(outputs)]
    backward(losses)
    modules = nn.ModuleList(nets)
    return {
        **{f"output {n}": y for n, y in enumerate(outputs)},
        **{f"input {n}": x.grad for n, x in enumerate(inputs)},
        **{name: p.grad for name, p in modules.named_parameters()},
        **dict(modules.named_buffers()),
    }


def assert_same(region, make_net, make_inputs, backward=lambda losses: sum(losses).backward()):
    """`region` computes what the plain call does; the exchanges of both are equal."""
    counted = counting() if dist.is_initialized() else []
    found, exchanges = [], []
    for run in (lambda net, x: net(x), region):
        torch.manual_seed(11)
        counted.clear()
        found.append(trained(run, make_net(), make_inputs(), backward))
        exchanges.append(sorted(counted))
    for name, expected in found[0].items():
        assert_close(found[1][name], expected, 1e-11, name)
    assert exchanges[0] == exchanges[1]


def several(shared, **options):
    """What `trained` takes as a net: one block, or one for each step."""
    one = block(**options)
    return one if shared else [copy.deepcopy(one) for _ in range(STEPS)]


@pytest.mark.slow_if(lambda kind, way, **_: way != "shared" and kind not in BY_EVERY_WAY)
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("equal", "shared", "way"),
    [
        *[(True, True, way) for way in ("shared", "sockets", "gloo")],
        *[(False, True, "shared"), (True, False, "shared")],
    ],
)
@pytest.mark.parametrize("kind", sorted(REGIONS))
def test_ranks_train_as_without_checkpointing(world_size, kind, equal, shared, way):
    by_way(way)(assert_same)(
        region=REGIONS[kind],
        make_net=lambda: several(shared),
        make_inputs=lambda: batches(equal),
    )


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("kind", sorted(REGIONS))
def test_one_process_trains_as_without_checkpointing(kind, act):
    if kind == "selective_save_all" and act is None:
        pytest.skip("torch's own layer refuses it: what it counts changes what is saved")
    assert_same(REGIONS[kind], lambda: block(act=act), lambda: batches(equal=True))
