"""Every kind of activation checkpointing, each as a function `(block, x) -> y`."""

import functools

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

ATEN = torch.ops.aten
POLICIES = {
    "save_products": lambda ctx, op, *args, **kwargs: op is ATEN.addmm.default,
    "save_all": lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_SAVE,
    "save_none": lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE,
}


class Megatron(torch.autograd.Function):
    """A reentrant checkpoint as Megatron, DeepSpeed and fairscale write it."""

    @staticmethod
    def forward(ctx, run_function, *args):
        ctx.run_function = run_function
        with torch.no_grad():
            outputs = run_function(*args)
        ctx.save_for_backward(*args)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        inputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors)
        with torch.enable_grad():
            outputs = ctx.run_function(*inputs)
        torch.autograd.backward(outputs, grads)
        return (None, *(x.grad for x in inputs))


class SelfNamed(torch.autograd.Function):
    """The same, older: its context is called self."""

    @staticmethod
    def forward(self, run_function, x):
        self.run_function = run_function
        self.save_for_backward(x)
        return run_function(x)

    @staticmethod
    def backward(self, grad):
        x = self.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = self.run_function(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class Derived(SelfNamed):
    """A checkpoint whose forward calls another's with the same context."""

    @staticmethod
    def forward(ctx, run_function, x):
        return SelfNamed.forward(ctx, run_function, x)


non_reentrant = functools.partial(checkpoint, use_reentrant=False)
reentrant = functools.partial(checkpoint, use_reentrant=True)


def selective(policy):
    contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
    return functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


def inside(outer, inner):
    return lambda block, x: outer(lambda x: inner(block, x), x)


def under(context, region):
    def run(block, x):
        with context():
            return region(block, x)

    return run


def offloading(block, x):
    def offloaded(x):
        with save_on_cpu():
            return block(x)

    return checkpoint(offloaded, x, use_reentrant=False)


def as_module(block, wrap):
    """`block` as a module of its own that shares its layers, wrapped."""
    return wrap(nn.Sequential(*block))


def sequential(block, x):
    return checkpoint_sequential(list(block), 2, x, use_reentrant=False)


REGIONS = {
    "non_reentrant": non_reentrant,
    "without_early_stop": under(lambda: set_checkpoint_early_stop(False), non_reentrant),
    "without_rng_state": functools.partial(non_reentrant, preserve_rng_state=False),
    "debugged": functools.partial(non_reentrant, debug=True),
    "reentrant": reentrant,
    "reentrant_without_rng_state": functools.partial(reentrant, preserve_rng_state=False),
    "megatron": Megatron.apply,
    "self_named": SelfNamed.apply,
    "derived": Derived.apply,
    "nested": inside(non_reentrant, non_reentrant),
    "nested_reentrant": inside(reentrant, reentrant),
    "nested_thrice": inside(non_reentrant, inside(reentrant, non_reentrant)),
    "reentrant_in_non_reentrant": inside(non_reentrant, reentrant),
    "megatron_in_non_reentrant": inside(non_reentrant, Megatron.apply),
    "non_reentrant_in_megatron": inside(Megatron.apply, non_reentrant),
    "offloaded_inside": offloading,
    "offloaded_around": under(save_on_cpu, non_reentrant),
    "wrapper": lambda block, x: as_module(block, checkpoint_wrapper)(x),
    "composable": lambda block, x: as_module(block, composable)(x),
    "sequential": sequential,
    **{f"selective_{policy}": selective(policy) for policy in POLICIES},
}
