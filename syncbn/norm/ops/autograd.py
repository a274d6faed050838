"""The layer as a function of autograd: forward and backward, each with one exchange.

* dweight and dbias stay local sums, because DistributedDataParallel averages them; reducing them here too would count
  them twice.
* Statistics are kept on the node, not among its saved tensors: activation checkpointing computes saved tensors
  again, and these are the ones of the first time.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.nn.parallel import DistributedDataParallel

from syncbn.norm.backends import selected
from syncbn.norm.backends.activations import ACTIVATIONS
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend, NormArgs, Running, kernels_may_read
from syncbn.norm.backends.layout import memory_format
from syncbn.norm.backends.triton.derivative_bits import unpack_bits
from syncbn.norm.comm.exchange import Exchange, Fingerprint
from syncbn.norm.comm.fingerprint import BACKWARD, FORWARD, NAMED
from syncbn.norm.moments import Stats
from syncbn.norm.ops.collectives import gather_rows
from syncbn.norm.ops.double_backward import Gradients, differentiable_gradients
from syncbn.norm.ops.recompute import Pass, unobserved
from syncbn.norm.uneven_inputs import refuse_ddp_join
from syncbn.norm.validation import tell_ranks

_AS_USUAL = nullcontext()


class Call(NamedTuple):
    """One use of a layer: all that is not a differentiable tensor.

    Attributes:
        exchange: with the other ranks; None for this rank alone.
        mask: see `NormArgs`, as for `act`, `eps`, `running` and `layer`.
        act: a name in `ACTIVATIONS`, or None.
        eps: added to the variance.
        running: what to update, or None.
        layer: what error messages call the layer.
        serial: of a layer without a name of its own, when it was built; see `Fingerprint`.
        checkpointed: this pass in its checkpointed region; None where it lies in none.
        grad_enabled: whether the caller records gradients; inside a Function nothing does.
    """

    exchange: Exchange | None = None
    mask: Tensor | None = None
    act: str | None = None
    eps: float = 1e-5
    running: Running | None = None
    layer: str = ""
    serial: int = NAMED
    checkpointed: Pass | None = None
    grad_enabled: bool = True

    def args(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> NormArgs:
        """The operands of a pass."""
        exchange, mask, act, eps, running, layer = self[:6]
        world_size = 1 if exchange is None else exchange.world_size
        return NormArgs(x, weight, bias, residual, mask, act, eps, running, layer, world_size)

    def fingerprint(self, x: Tensor, needs_grad: bool) -> Fingerprint:
        """What all ranks must agree on when they exchange values over `x`."""
        return Fingerprint(self.layer, x.shape[1], x.dtype, needs_grad, self.serial)


class SyncBatchNormFunction(torch.autograd.Function):
    """y = act(batch_norm(x) + residual) over the ranks of `call.exchange`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Normalise; keep what backward needs and no more."""
        args = call.args(x, weight, bias, residual)
        # a device's type takes 0.3 us to name
        backend = selected("cpu" if x.is_cpu else x.device.type).for_pass(args)
        # selective checkpointing observes operations, and wants the same ones in a replay
        with _AS_USUAL if call.checkpointed is None else unobserved():
            if residual is not None and call.grad_enabled and any(ctx.needs_input_grad):
                args = args._replace(bits=backend.empty_bits(args))
            y, stats = forward_pass(
                args, backend, call, call.grad_enabled and ctx.needs_input_grad[0]
            )
        ctx.call, ctx.backend, ctx.stats = call, backend, stats
        if args.bits is not None:
            # their order follows x's, which hooks on saved tensors may change
            ctx.memory_format = memory_format(x)
        ctx.save_for_backward(x, weight, bias, *kept_for_backward(args, y), args.bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight, bias and residual."""
        x, weight, bias, residual, output, bits = ctx.saved_tensors
        if bits is not None:
            x = x.contiguous(memory_format=ctx.memory_format)
        args = ctx.call.args(x, weight, bias, residual)
        if output is not None or bits is not None:
            args = args._replace(output=output, bits=bits)
        needs = ctx.needs_input_grad[:4]
        return *backward_pass(dy, args, ctx.stats, ctx.backend, ctx.call, needs), None


def forward_pass(
    args: NormArgs, backend: Backend, call: Call, needs_grad: bool
) -> tuple[Tensor, Stats]:
    """The output, and the statistics of all ranks; updates running statistics, but in a replay.

    Raises:
        NonFiniteStatistics, ValueError: see `check_statistics`; or an operand does not fit x.
        RanksDisagree, RankLost: see `Exchange.combine`.
        RuntimeError: inside `DistributedDataParallel.join()`.
    """
    if call.exchange is not None and DistributedDataParallel._active_ddp_module is not None:
        refuse_ddp_join(call.layer)
    checkpointed = call.checkpointed
    _check_fit(args, call.exchange, args.running)
    known = None if checkpointed is None else checkpointed.known(args.x.shape[1])
    if known is not None:
        return backend.normalize(args, known), known
    what = call.fingerprint(args.x, needs_grad)
    if backend.fused:
        y, stats = backend.fused_forward(args, call.exchange, what)
    else:
        packed = backend.local_stats(args)  # (2 + 2C,)
        gathered = gather_rows(packed, call.exchange, FORWARD, what)  # (W, 2 + 2C)
        y, stats = backend.finish_forward(args, gathered)
    if checkpointed is not None:
        checkpointed.record(stats)
    return y, stats


def backward_pass(
    dy: Tensor, args: NormArgs, stats: Stats, backend: Backend, call: Call, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients of x, weight, bias and residual, as far as `needs` asks for them.

    Raises:
        RanksDisagree, RankLost: see `Exchange.combine`.
        ValueError: hooks on gradients or on saved tensors gave one that does not fit x.
    """
    needs_x, needs_weight, needs_bias, needs_residual = needs
    if dy.layout is not torch.strided:
        dy = dy.to_dense()
    third = args.residual if args.output is None else args.output
    _check_fit(args, call.exchange, None, dy, third)
    what = call.fingerprint(args.x, True)
    if torch.is_grad_enabled() or is_transformed(dy):
        gradients = differentiable_gradients(dy, args, stats.total, call.exchange, what)
        dx, dweight, dbias, dz = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return dx, dweight, dbias, dz
    # hooks may have changed what comes back, and kernels in C++ read one dtype
    dtype = args.x.dtype
    same = dy.dtype is dtype and (third is None or third.dtype is dtype or not backend.fused)
    if not same or not kernels_may_read(dy, *args[:3], third):
        backend = AtenBackend()
        if args.bits is not None:
            args = args._replace(output=unpack_bits(args.bits, args.x), bits=None)
    dx = dz = sums = None
    if needs_x and backend.fused:
        if needs_residual:
            dy = dz = backend.grad_residual(dy, args, stats)
            args = args.before_act()
        dx, sums = backend.fused_backward(dy, args, stats, call.exchange, what)
    elif needs_x or needs_weight or needs_bias:
        sums, dz = backend.local_grad_sums(dy, args, stats, needs_residual)  # (2, C)
        if needs_x:
            if dz is not None:
                dy, args = dz, args.before_act()
            gathered = gather_rows(sums, call.exchange, BACKWARD, what)  # (W, 2C)
            dx = backend.finish_backward(dy, args, stats, gathered)
    elif needs_residual:
        dz = backend.grad_residual(dy, args, stats)
    dbias, dweight = (None, None) if sums is None else sums.unbind()
    return (
        dx,
        _gradient_of(args.weight, dweight, needs_weight),
        _gradient_of(args.bias, dbias, needs_bias),
        dz,
    )


def _check_fit(
    args: NormArgs, exchange: Exchange | None, running: Running | None, *like_x: Tensor | None
) -> None:
    """Raise for an operand that lies elsewhere or holds more or fewer values than a pass reads at its address.

    Args:
        args: of this pass, with one value per channel in the parameters.
        exchange: whose ranks are told.
        running: what the pass updates, one value per channel too.
        like_x: tensors in the shape of x, beyond those that the layer has checked when it was called.
    """
    device, shape = args.x.device, args.x.shape
    for values in like_x:
        if values is not None and (values.shape != shape or values.device != device):
            _refuse(values, f"shape {tuple(shape)}", args, exchange)
    num_channels, parameters = shape[1], args[1:3]
    for values in parameters if running is None else parameters + running[:2]:
        if values is None:
            continue
        if values.numel() != num_channels or values.dim() != 1 or values.device != device:
            _refuse(values, f"one value for each of {num_channels} channels", args, exchange)


def _refuse(values: Tensor, expected: str, args: NormArgs, exchange: Exchange | None) -> NoReturn:
    got = f"{tuple(values.shape)} on {values.device}"
    message = f"{args.layer}: expected {expected} on {args.x.device}, got {got}"
    tell_ranks(exchange, args.x, message)
    raise ValueError(message)


def kept_for_backward(args: NormArgs, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Residual and output, as far as backward needs them: z is computed again from x where that is enough."""
    if args.act is None or args.residual is None or args.bits is not None:
        return None, None
    return (None, y) if ACTIVATIONS[args.act].from_output else (args.residual, None)


def is_transformed(dy: Tensor) -> bool:
    """Whether a transform wraps `dy`: it holds a batch of gradients (vmap), or is traced by torch.func."""
    return is_legacy_batchedtensor(dy) or is_functorch_wrapped_tensor(dy)


def _gradient_of(parameter: Tensor | None, gradient: Tensor | None, needed: bool) -> Tensor | None:
    if parameter is None or gradient is None or not needed:
        return None
    return gradient if gradient.dtype is parameter.dtype else gradient.to(parameter.dtype)
