"""`begin_norms`: several layers in one exchange, and other work while it is under way.

Models say where their branches are siblings; the rest of a layer's life, from its hooks to its errors, is that of a
layer which is called.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules import module

from syncbn.norm.counterparts import SyncBatchNormAct
from syncbn.norm.exchange import exchange_of
from syncbn.norm.groups import known, resolve
from syncbn.norm.joint import BeginFunction, FinishFunction, Joint, joint_name
from syncbn.norm.module import SyncBatchNorm, finishing


class _Share(NamedTuple):
    """One layer's part in what has been begun.

    Attributes:
        joint: what all of them share.
        place: of this layer there.
        handed: its input, as handed on.
    """

    joint: Joint
    place: int
    handed: Tensor


class BegunNorm:
    """A norm layer whose moments are on their way; `finish` gives what calling the layer would have given."""

    def __init__(self, layer: nn.Module, input: Tensor, mask: Tensor | None) -> None:
        self.layer, self._input, self._mask = layer, input, mask
        self._state: object = None
        self._share: _Share | None = None
        self._finished = False
        self.title = layer._title() if isinstance(layer, SyncBatchNorm) else ""
        """What the layer, with those that it meets the other ranks with, is called."""

    def finish(self, residual: Tensor | None = None) -> Tensor:
        """The layer's output: act(batch_norm(input) + residual), as of `SyncBatchNorm.forward`, hooks included.

        Raises:
            RuntimeError: it was finished before; or since it began its input or mask was modified in place, or its mode
                or the mode of gradients changed.
            ValueError: a residual that does not fit; other ranks are not told.
        """
        if self._finished:
            raise RuntimeError(f"{self.title or 'a layer'}: finish() was called twice")
        self._finished = True
        if self._state is not None and self._state != self._state_now():
            raise RuntimeError(
                f"{self.title}: its input or its mode has changed since it was begun"
            )
        layer, input = self.layer, self._input
        if not isinstance(layer, SyncBatchNorm):
            y = layer(input)
            return y if residual is None else y + residual
        operands = {"mask": self._mask, "residual": residual}
        operands = {name: given for name, given in operands.items() if given is not None}
        if self._state is None:
            return layer(input, **operands)
        token = finishing.set(self)
        try:
            return layer(input, **operands)
        finally:
            finishing.reset(token)
            del self._input, self._mask

    def normalized(self, input: Tensor, mask: Tensor | None, residual: Tensor | None) -> Tensor:
        """What the layer computes in training mode; it is called by the layer, once."""
        layer, share = self.layer, self._share
        assert isinstance(layer, SyncBatchNorm)
        assert share is not None, "else the layer goes its usual way"
        self._share = None
        if input is not self._input or mask is not self._mask:
            raise RuntimeError(f"{self.title}: it is given another input than it was begun with")
        layer._check_input(input, mask, residual)
        return FinishFunction.apply(
            input, share.handed, layer.weight, layer.bias, residual, share.joint, share.place
        )

    def note_state(self) -> None:
        """Have `finish` compare what must not change."""
        self._state = self._state_now()

    def _state_now(self) -> tuple[object, ...]:
        operands = (self._input, self._mask)
        versions = [None if t is None or t.is_inference() else t._version for t in operands]
        return self.layer.training, torch.is_grad_enabled(), *versions

    @property
    def shares(self) -> bool:
        """Whether the layer has sent something that is not finished."""
        return self._share is not None


Begin = tuple[nn.Module, Tensor] | tuple[nn.Module, Tensor, Tensor | None]
"""A layer, its input, and its mask."""


def begin_norms(*layers: Begin) -> tuple[BegunNorm, ...]:
    """Begin several norm layers at once: they meet the other ranks in one exchange each way instead of one each.

    For branches that are siblings, like the last norm of a residual block and that of its shortcut, and for a layer
    whose exchange has something to overlap with::

        main, side = syncbn.begin_norms((self.bn3, self.conv3(out)), (self.shortcut_bn, self.shortcut(x)))
        ...                                                # what needs neither result
        return main.finish(residual=side.finish())

    Each `finish` gives what calling its layer would have given, to the bit where values are gathered; the backward
    pass exchanges once too, as soon as the last of these layers has been reached, and goes on with what lies
    between `begin_norms` and `finish` meanwhile. Layers whose groups, dtypes or devices differ have an exchange for
    each. A model may use this whatever its norms are: `finish` simply calls layers of other classes, layers in eval
    mode, all layers under `torch.compile`, those with hooks that come before them or look at their gradients, and those
    whose ranks are one, or share memory, where an exchange costs less than what it takes to share it. Which layers have
    such hooks must be the same on all ranks. With activation checkpointing, begin and finish in the same region.

    Args:
        layers: pairs of a layer and its input `(N, C, *)`, or triples with its mask `(N, 1, *)`, the same on all ranks.

    Returns:
        One `BegunNorm` a layer, in order. Each is to be finished once; statistics move then.

    Raises:
        ValueError: a mask for a layer that takes none; inputs and masks as in `SyncBatchNorm.forward`.
        TypeError: as there.
    """
    begun: list[BegunNorm] = []
    parts: dict[tuple[ProcessGroup, Hashable], list[BegunNorm]] = {}
    for layer, input, *rest in layers:
        mask = rest[0] if rest else None
        if mask is not None and not isinstance(layer, SyncBatchNorm):
            raise ValueError(f"a mask was given for a {type(layer).__name__}, which takes none")
        begun.append(BegunNorm(layer, input, mask))
        group = _group(layer)
        if group is not None:
            parts.setdefault((group, (input.dtype, input.device)), []).append(begun[-1])
    for (group, _), together in parts.items():
        _begin(together, group)
    return tuple(begun)


def _group(layer: nn.Module) -> ProcessGroup | None:
    """With whom `layer` is synchronised and may share an exchange; None where it is to be called."""
    if not isinstance(layer, SyncBatchNorm) or torch.compiler.is_compiling():
        return None
    if not dist.is_available() or not _is_plain(layer):
        return None
    if not (layer.training or torch.is_grad_enabled()):
        return None
    group = resolve(layer.process_group) if layer.training else known(layer.process_group)
    return None if group is None or dist.get_world_size(group) == 1 else group


def _is_plain(layer: SyncBatchNorm) -> bool:
    """Whether calling `layer` hands its input to our forward as it is."""
    known_forward = type(layer).forward in (SyncBatchNorm.forward, SyncBatchNormAct.forward)
    hooks = (
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
        module._global_forward_pre_hooks,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )
    return known_forward and "forward" not in layer.__dict__ and not any(hooks)


def _begin(begun: Sequence[BegunNorm], group: ProcessGroup) -> None:
    """Begin layers of one group, dtype and device; those in eval mode are only told how others know them."""
    for one in begun:
        one.note_state()
    exchange = exchange_of(group)
    if exchange.memory is not None:
        return
    training = [one for one in begun if one.layer.training]
    name = joint_name([one.title for one in training or begun])
    for one in training or begun:
        one.title = name
    if not training:
        return
    layers: list[Any] = [one.layer for one in training]
    for layer, one in zip(layers, training, strict=True):
        layer._check_input(one._input, one._mask, None, group)
    calls = [
        layer._call(one._input, one._mask, exchange)
        for layer, one in zip(layers, training, strict=True)
    ]
    joint = Joint(exchange, calls)
    handed = BeginFunction.apply(joint, *(one._input for one in training))
    for place, one in enumerate(training):
        one._share = _Share(joint, place, handed[place])
