"""Layers that meet the other ranks together: one exchange each way for all of them, and other work meanwhile.

A pass is two kinds of node here instead of one. `BeginFunction` sends the moments of all its layers and hands their
inputs on; a `FinishFunction` for each layer, any time later, takes what has come and normalises. The backward pass
goes the other way round: each `FinishFunction` reduces what it is given, the last of them sends the sums, and
`BeginFunction` makes the inputs' gradients of what has come. Autograd runs first what was recorded last, so that
whatever lay between the two in the forward pass lies between them again.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.norm import apart, kernels, launched
from syncbn.norm.autograd import (
    differentiable_gradients,
    keep,
    kept,
    parameters,
    reduced,
    room,
)
from syncbn.norm.exchange import Exchange, Place
from syncbn.norm.header import NAMED, TEXT_BYTES
from syncbn.norm.join import refuse_ddp_join
from syncbn.norm.kernels import Affine, Fused
from syncbn.norm.moments import Block
from syncbn.norm.pending import Pending
from syncbn.norm.replay import Found, Remembered, replaying
from syncbn.norm.steps import Call, Reduced, merged, recalled

Rows = Pending[Sequence[Tensor]]
"""What all ranks send, row by row, for each layer that takes part."""


class Joint:
    """What the nodes of layers that meet together share.

    Args:
        exchange: in which they meet.
        calls: of each layer, over that exchange.
    """

    def __init__(self, exchange: Exchange, calls: Sequence[Call]) -> None:
        self.calls, self._exchange = calls, exchange
        self._own: list[Tensor] = []
        self._blocks: dict[int, Block] = {}
        self._needs: Sequence[bool] = ()
        self._known: dict[int, Remembered] = {}
        # a layer's place among those that take part in the exchange
        self._asked: dict[int, int] = {}
        self._moments: Rows | None = None
        self._backward_pass = -1
        self._halves: dict[int, Reduced] = {}
        self._sums: Rows | None = None

    def send_moments(self, xs: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Begin the exchange of the forward pass, unless it is a replay of one; `needs` tells who wants a gradient."""
        self._needs = needs
        for layer, (x, call) in enumerate(zip(xs, self.calls, strict=True)):
            refuse_ddp_join(call.name)
            block = apart.moments(x, call)
            if block is not None:
                self._blocks[layer] = block
            own = kernels.pick(x).moments(x, call.mask) if block is None else block.own
            self._own.append(own)
            known = recalled(own, call)
            if known is None:
                self._asked[layer] = len(self._asked)
            else:
                self._known[layer] = known
        if self._asked:
            own = [self._own[layer] for layer in self._asked]
            place = self._place(list(self._asked), xs[0].dtype, any(needs))
            self._moments = self._exchange.begin_moments(own, **place)

    def normalize(
        self, layer: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, fused: Fused
    ) -> tuple[Tensor, Found]:
        """The output of one layer and what it was normalised with; waits for the exchange."""
        kernel, found, call = kernels.pick(x), self._known.get(layer), self.calls[layer]
        if found is None:
            assert self._moments is not None, "somebody asked"
            packed = self._moments.result()[self._asked[layer]]
            block = self._blocks.get(layer)
            if block is not None:
                y = apart.finish(x, block, packed, weight, bias, fused.residual, call)
                if y is not None:
                    return y, block
            packed = packed.contiguous()
            quick = None if replaying() else launched.kernels_of(x)
            if quick is not None:
                own = self._own[layer]
                return launched.finished(quick, x, own, packed, weight, bias, fused, call)
            found = merged(self._own[layer], packed, x, kernel, call)
        affine = Affine(found.statistics.mean, found.statistics.invstd, weight, bias)
        return kernel.normalize(x, affine, fused), found

    def reduce(self, layer: int, half: Reduced, dtype: torch.dtype) -> None:
        """Take one layer's half of the backward pass; the last begins the exchange."""
        backward_pass = torch._C._current_graph_task_id()
        if backward_pass != self._backward_pass:
            self._forget()
            self._backward_pass = backward_pass
            # for passes in which nobody wants dx
            torch.autograd.Variable._execution_engine.queue_callback(self._forget)  # pyright: ignore[reportAttributeAccessIssue]
        self._halves[layer] = half
        if len(self._halves) == sum(self._needs):
            self._send_sums(dtype)

    def input_gradients(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The gradients of the inputs; waits for the exchange."""
        gradients: list[Tensor | None] = [None] * len(self.calls)
        if self._backward_pass != torch._C._current_graph_task_id():
            return gradients  # the layers have gone the differentiable way
        rows = (self._sums or self._send_sums(dtype)).result()
        for layer, everyones in zip(self._waiting, rows, strict=True):
            if layer in self._halves:
                gradients[layer] = self._halves[layer].finish(everyones)
        self._forget()
        return gradients

    def _forget(self) -> None:
        """Let go of what belongs to one backward pass."""
        self._halves, self._sums, self._backward_pass = {}, None, -1

    @property
    def _waiting(self) -> list[int]:
        """The layers whose inputs want a gradient."""
        return [layer for layer, needed in enumerate(self._needs) if needed]

    def _send_sums(self, dtype: torch.dtype) -> Rows:
        """Begin the exchange of the backward pass; an output that nobody used adds nothing."""
        halves = [self._halves.get(layer) for layer in self._waiting]
        parts = [
            self._own[layer].new_zeros(2, self._channels(layer)) if half is None else half.sums
            for layer, half in zip(self._waiting, halves, strict=True)
        ]
        self._sums = rows = self._exchange.begin_addends(
            parts, **self._place(self._waiting, dtype, True)
        )
        return rows

    def _channels(self, layer: int) -> int:
        return self._own[layer].numel() // 2 - 1

    def _place(self, layers: Sequence[int], dtype: torch.dtype, needs_grad: bool) -> Place:
        """What ranks must agree on when these layers meet."""
        calls = [self.calls[layer] for layer in layers]
        serials = tuple(call.serial for call in calls)
        return Place(
            layer=joint_name([call.name for call in calls]),
            channels=sum(map(self._channels, layers)),
            dtype=dtype,
            needs_grad=needs_grad,
            serial=serials if any(serial != NAMED for serial in serials) else NAMED,
        )


def joint_name(names: Sequence[str]) -> str:
    """Several layers' names as one, what they have in common first: `layer1.0.{bn3, downsample.1}`."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    front = "".join(f"{part}." for part in split[0][:common])
    name = f"{front}{{{', '.join('.'.join(parts[common:]) for parts in split)}}}"
    # of a longer text headers carry the end
    return name if len(name.encode()) <= TEXT_BYTES else f"{name} {zlib.crc32(name.encode()):08x}"


def _copied(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().clone()


class BeginFunction(torch.autograd.Function):
    """Send the moments of inputs, and hand the inputs on to the layers that finish."""

    @staticmethod
    def forward(ctx: Any, joint: Joint, *xs: Tensor) -> tuple[Tensor, ...]:
        """The inputs, as tensors through which no gradient flows but what `FinishFunction` was given."""
        ctx.set_materialize_grads(False)
        ctx.joint, ctx.dtype = joint, xs[0].dtype
        needs = ctx.needs_input_grad[1:]
        joint.send_moments(xs, needs)
        handed = tuple(x.detach() for x in xs)
        ctx.mark_non_differentiable(
            *(x for x, needed in zip(handed, needs, strict=True) if not needed)
        )
        return handed

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs; nothing where the layers have given them already."""
        return None, *ctx.joint.input_gradients(ctx.dtype)


class FinishFunction(torch.autograd.Function):
    """y = act(batch_norm(x) + residual), x having been begun."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        handed: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        joint: Joint,
        layer: int,
    ) -> Tensor:
        """Normalise; `handed` is x again, and brings its gradient to `BeginFunction`."""
        del handed
        ctx.joint, ctx.layer, ctx.call = joint, layer, joint.calls[layer]
        fused = room(ctx, x, residual)
        y, ctx.found = joint.normalize(layer, x, weight, bias, fused)
        keep(ctx, x, weight, bias, fused, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of weight, bias and residual; that of x too where it will be differentiated itself."""
        x, weight, bias, fused = kept(ctx)
        needs_x, needs_handed, *rest = ctx.needs_input_grad[:5]
        needs = (needs_x, *rest)
        if torch.is_grad_enabled():
            total = ctx.found.statistics.total
            dx, *others, _ = differentiable_gradients(
                dy, x, weight, bias, fused, total, ctx.call, needs
            )
            return dx, None, *others, None, None
        # who is given the gradients may change them and the parameters before those of the inputs are made
        weight, bias = _copied(weight), _copied(bias)
        half = reduced(dy, x, weight, bias, fused, ctx.found, needs[3])
        gradients = parameters(half.sums.clone(), weight, bias, needs)
        if needs_handed:
            ctx.joint.reduce(ctx.layer, half, x.dtype)
        return None, dy if needs_handed else None, *gradients, half.dresidual, None, None
