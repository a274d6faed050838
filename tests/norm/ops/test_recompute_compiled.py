"""Checkpointing around a compiled block, and inside a compiled function."""

import functools

import pytest
import torch
from checkpointed_regions import Megatron, non_reentrant, reentrant
from test_recompute import assert_same, batches, block
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

compiled = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)


def _ours(ctx, op, *args, **kwargs):
    saved = str(op).startswith("syncbn")
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _never(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_RECOMPUTE


def _every_second(ctx, op, *args, **kwargs):
    """Saves one of two passes of the layer."""
    _every_second.turn += str(op).startswith("syncbn")
    return _ours(ctx, op) if _every_second.turn % 2 else _never(ctx, op)


_every_second.turn = 0


def selective(policy):
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


INSIDE = {
    "non_reentrant": non_reentrant,
    "reentrant": reentrant,
    "saves_ours": selective(_ours),
    "saves_nothing": selective(_never),
}
AROUND = {**INSIDE, "megatron": Megatron.apply, "saves_every_second": selective(_every_second)}


@pytest.mark.untraced
@pytest.mark.slow_if(lambda kind, **_: kind.startswith("saves_") and kind != "saves_every_second")
@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", sorted(AROUND))
def test_checkpointing_around_a_compiled_block(world_size, kind):
    torch._dynamo.reset()
    assert_same(lambda net, x: AROUND[kind](compiled(net), x), block, lambda: batches(equal=True))


@pytest.mark.slow_if(lambda kind, **_: kind in ("reentrant", "saves_nothing"))
@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", sorted(INSIDE))
def test_a_compiled_function_with_a_checkpoint_inside_exchanges_no_more(world_size, kind):
    torch._dynamo.reset()

    def region(net, x):
        return compiled(lambda x: INSIDE[kind](net, x) * 2)(x) / 2

    assert_same(region, block, lambda: batches(equal=True))


@pytest.mark.untraced
@pytest.mark.world_size(2)
def test_a_compiled_function_with_a_checkpoint_inside_inside_a_checkpoint(world_size):
    torch._dynamo.reset()

    def region(net, x):
        inner = compiled(lambda x: non_reentrant(net, x) * 2)
        return non_reentrant(inner, x) / 2

    assert_same(region, block, lambda: batches(equal=True))
