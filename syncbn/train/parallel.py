"""How the network is spread over ranks: whole on each of them, or each with a part of every parameter.

The loop sees the interface, `Alone`, and nothing of what is behind it. With `fsdp`, torch's `fully_shard` cuts every
parameter along its first dimension. What is gathered together for a forward or backward pass is a block, a part of a
`nn.Sequential` among the model's children as of activation checkpointing; the rest of the model is gathered with it.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.errors import UsageError
from syncbn.runtime.base import Runtime
from syncbn.train.lockstep import Lockstep, keep_layers_in_step
from syncbn.train.network import sequential_parts


def parallel(name: str, runtime: Runtime) -> "Alone":
    """What `train.parallel=name` means on the ranks of `runtime`; a process alone spreads nothing."""
    if runtime.world_size == 1:
        return Alone(runtime)
    return {"ddp": Replicated, "fsdp": Sharded}[name](runtime)


class Alone:
    """One process, which has all of the network; and what the others share with it."""

    sets_gradients_to_none = True
    """Whether gradients are dropped after a step, or set to 0 where they are."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def place(self, model: nn.Module) -> None:
        """Bring `model` to the rank's device, before its optimiser is built; its names stay."""
        model.to(self.runtime.device)

    def in_step(self, network: nn.Module, num_classes: int) -> nn.Module:
        """`network`, with which ranks stay in step when statistics are not finite in one group of them alone."""
        return Lockstep(network, num_classes)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """`network`, with gradients averaged over ranks."""
        return network

    def unreduced(self) -> AbstractContextManager[Any]:
        """Within, backward passes add gradients up on each rank, without a reduction."""
        return nullcontext()

    def evaluation(self) -> AbstractContextManager[Any]:
        """What forward passes without gradients run in; parameters may be changed afterwards."""
        return nullcontext()


class Replicated(Alone):
    """The whole network on each rank, and its gradients averaged (DistributedDataParallel)."""

    sets_gradients_to_none = False  # they are views of what is reduced

    def wrapped(self, network: nn.Module) -> nn.Module:
        """See `Alone`."""
        # Buffers are settled before they are used (`settle_buffers`), which spares a broadcast a step.
        buffers = [name for name, _ in network.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, buffers)
        self._network = _Replicas(network, gradient_as_bucket_view=True)
        return self._network

    def unreduced(self) -> AbstractContextManager[Any]:
        """See `Alone`."""
        return self._network.no_sync()


class _Replicas(DistributedDataParallel):
    """Says in one line which parameters took no part in the step before."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DistributedDataParallel's."""
        try:
            return super().forward(*inputs, **kwargs)
        except RuntimeError as error:
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            if found is None:
                raise
            trained = [name for name, p in self.module.named_parameters() if p.requires_grad]
            unused = ", ".join(trained[int(index)] for index in found[1].split())
            raise UsageError(
                f"parameters of the model took no part in the loss, which several ranks cannot train: {unused}; use "
                "them, leave them out, or give them requires_grad=False"
            ) from error


class Sharded(Alone):
    """A part of each parameter, of its gradient and of what the optimiser remembers on each rank (`fully_shard`)."""

    def place(self, model: nn.Module) -> None:
        """See `Alone`. Block by block, so that the device never holds all of the model.

        Raises:
            UsageError: a parameter that cannot be cut.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = self.runtime.device
        mesh = init_device_mesh(device.type, (self.runtime.world_size,))
        model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self._name = type(model).__name__
        try:
            for module in (*blocks(model), model):
                fully_shard(module, mesh=mesh)
        except (ValueError, NotImplementedError) as error:
            raise UsageError(_unfit(self._name, error)) from error
        self._root: Any = model

    def in_step(self, network: nn.Module, num_classes: int) -> nn.Module:
        """See `Alone`. A forward pass that ended early would leave the other ranks alone in gathering parameters."""
        del num_classes
        keep_layers_in_step(network)
        return network

    def wrapped(self, network: nn.Module) -> nn.Module:
        """See `Alone`."""
        return _Explained(network, self._name)

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        """See `Alone`."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """See `Alone`. The root keeps what it gathered until a backward pass, which does not follow."""
        try:
            yield
        finally:
            self._root.reshard()


class _Explained(nn.Module):
    """`network`, which says in one line when it takes a parameter that is not gathered."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self._name = network, name

    def forward(self, *inputs: Any) -> Any:
        """As `network`."""
        try:
            return self.network(*inputs)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise UsageError(_unfit(self._name, error)) from error


def _unfit(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"train.parallel=fsdp is not allowed for this {name}, a parameter of which cannot be cut or is used outside "
        f"the forward pass of its own module ({reason}): use train.parallel=ddp"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts of `model`'s Sequential children with parameters that nothing outside of the part has."""
    parts = list(dict.fromkeys(sequential_parts(model)))
    inside = {module for part in parts for module in part.modules()}
    outside = [module for module in model.modules() if module not in inside]
    uses = Counter(id(one) for part in parts for one in set(part.parameters()))
    uses.update(id(one) for module in outside for one in module.parameters(recurse=False))
    return [part for part in parts if {uses[id(one)] for one in part.parameters()} == {1}]
