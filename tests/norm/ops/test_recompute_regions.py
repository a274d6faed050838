"""How a region is found, what it remembers and for how long, and what is refused."""

import gc
import weakref

import pytest
import torch
from checkpointed_regions import Megatron, non_reentrant, reentrant, selective
from test_recompute import block
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import checkpoint as torchs

import syncbn
from syncbn.norm.backends.cpu import StatisticsBlock
from syncbn.norm.ops import recompute
from syncbn.norm.ops.recompute import current


class Watch(nn.Module):
    """Notes the pass that `current` sees, as a layer does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        found = current()
        self.seen.append(None if found is None else found.replaying)
        if found is not None and not found.replaying:
            found.record(None)
        return x.sin()


def leaf():
    return torch.randn(4, 3, requires_grad=True)


def test_nothing_surrounds_an_ordinary_pass():
    watch = Watch()
    watch(leaf()).sum().backward()
    with torch.no_grad():
        watch(leaf())
    with torch.inference_mode():
        watch(leaf())
    with save_on_cpu():
        watch(leaf()).sum().backward()
    x = leaf()
    x.register_hook(watch)
    x.sum().backward()
    assert watch.seen == [None] * 5


@pytest.mark.parametrize("region", [non_reentrant, reentrant, Megatron.apply])
def test_a_region_sees_its_passes_and_then_their_replays(region):
    watch = Watch()
    y = region(lambda x: watch(watch(x)) * 2, leaf()).sum()
    assert watch.seen == [False, False]
    y.backward()
    assert watch.seen[2:] == [True, True]


def test_grad_mode_inside_a_reentrant_region_hides_no_pass():
    def run(x):
        with torch.enable_grad():
            y = watch(x)
        return watch(y)

    watch = Watch()
    reentrant(run, leaf()).sum().backward()
    assert watch.seen == [False, False, True, True]


def test_a_search_leaves_the_hooks_as_they_were():
    def run(x):
        with saved_tensors_hooks(lambda t: t, lambda t: t), save_on_cpu():
            before = recompute._autograd._top_saved_tensors_default_hooks(True)
            current().record(None)
            packs = recompute._pack_hooks()
            assert recompute._autograd._top_saved_tensors_default_hooks(True) == before
            assert packs == recompute._pack_hooks()
            assert len(packs) == 3
        return x.sin()

    non_reentrant(run, leaf(), early_stop=False)


def test_where_hooks_are_disabled_the_innermost_is_seen():
    def run(x):
        recompute._autograd._saved_tensors_hooks_disable("no hooks here", False)
        try:
            watch(x.detach())
        finally:
            recompute._autograd._saved_tensors_hooks_enable()
        return x.sin()

    watch = Watch()
    non_reentrant(run, leaf())
    assert watch.seen == [False]
    recompute._autograd._saved_tensors_hooks_disable("no hooks here")
    try:
        assert recompute._pack_hooks() == []
    finally:
        recompute._autograd._saved_tensors_hooks_enable()


def memory_of(region, net, x):
    """Weak references to what the passes of a region recorded, and its result."""
    kept, original = [], recompute.Pass.record

    def record(self, statistics):
        one_block = isinstance(statistics, StatisticsBlock)
        kept.append(weakref.ref(statistics if one_block else statistics.mean))
        assert statistics.mean.shape == statistics.var.shape == (4,)
        original(self, statistics)

    recompute.Pass.record = record
    try:
        y = region(net, x)
    finally:
        recompute.Pass.record = original
    return y, kept


@pytest.mark.parametrize("region", [non_reentrant, reentrant, Megatron.apply])
def test_statistics_live_as_long_as_the_graph_of_their_region(region):
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y, kept = memory_of(region, block(act="relu"), x)
    gc.collect()
    assert len(kept) == 2
    alive = [ref() is not None for ref in kept]
    assert all(alive)
    y.sum().backward()
    del y
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]


@pytest.mark.parametrize("region", [non_reentrant, reentrant])
def test_a_graph_that_is_dropped_takes_the_statistics_along(region):
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y, kept = memory_of(region, block(act="relu"), x)
    del y
    gc.collect()
    assert not [ref for ref in kept if ref() is not None]


def test_a_replay_with_more_passes_is_refused():
    net = block().eval()
    y = non_reentrant(net, torch.randn(6, 4, dtype=torch.float64, requires_grad=True))
    net.train()
    with pytest.raises(
        RuntimeError, match="replays pass 1 of a synchronised layer in a region that ran 0"
    ):
        y.sum().backward()


def test_a_replay_in_another_order_is_refused():
    layers = [syncbn.SyncBatchNorm(n, act="relu") for n in (3, 2)]
    turn = []

    def run(x):
        turn.append(None)
        first, second = reversed(layers) if len(turn) > 1 else layers
        wide, narrow = x[:, : first.num_features], x[:, : second.num_features]
        return torch.cat([first(wide), second(narrow)], 1)

    y = non_reentrant(run, leaf())
    with pytest.raises(RuntimeError, match="ran in another order"):
        y.sum().backward()


def test_a_function_that_is_no_checkpoint_runs_ordinary_passes_in_its_backward():
    class Backwards(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            watch(gradient)
            return gradient

    watch = Watch()
    Backwards.apply(leaf()).sum().backward()
    assert watch.seen == [None]


class SetsContextApart(torch.autograd.Function):
    """A reentrant checkpoint whose `forward` has no `ctx` in which a region could be found."""

    @staticmethod
    def forward(x, run):
        with torch.no_grad():
            return run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.run = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = ctx.run(x.detach().requires_grad_())
        return torch.autograd.grad(y, y, dy)[0], None


def test_a_checkpoint_that_sets_its_context_apart_is_not_seen():
    watch = Watch()
    SetsContextApart.apply(leaf(), watch).sum().backward()
    assert watch.seen == [None, None]


def test_hooks_of_another_torch_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(recompute, "_CheckpointFrame", type("Other", (), {}))
    net = block(act="relu")
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=f"cannot tell which region .* in torch {torch.__version__[:4]}"
    ):
        non_reentrant(net, x)
    reentrant(net, x).sum().backward()
    assert int(net[1].num_batches_tracked) == 2


def test_a_hook_that_is_no_function_belongs_to_no_region():
    assert recompute._region_of(len) == (None, False)


def test_modes_that_compute_stay_and_those_that_watch_do_not():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    def watching():
        return torch._C._len_torch_dispatch_stack()

    with recompute.unobserved():
        assert watching() == 0
    with FlopCounterMode(display=False):
        with recompute.unobserved():
            assert watching() == 0
        assert watching() == 1
        with FakeTensorMode(), recompute.unobserved():
            assert type(torch.ones(2)) is not torch.Tensor


@pytest.mark.parametrize("policy", ["save_products", "save_none"])
def test_what_a_replay_must_not_count_is_given_back_when_it_ends_early(policy):
    net, x = nn.Sequential(syncbn.SyncBatchNorm(3)), leaf()
    y = selective(policy)(net, x)
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    y.sum().backward()
    assert int(net[0].num_batches_tracked) == 1
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, state[name]), name


def test_what_this_file_relies_on_is_in_torch():
    assert torchs._CheckpointFrame is recompute._CheckpointFrame
    assert recompute._ENGINE.co_name == "_engine_run_backward"
    assert any(code.co_name == "apply" for code in recompute._BACKWARD)
