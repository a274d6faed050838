"""Ranks of this machine, or of any job that sets torchrun's environment variables (torchrun, our workers on Ray)."""

import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.config import RunConfig
from syncbn.errors import UsageError
from syncbn.norm.comm.exchange import exchange_of
from syncbn.norm.comm.fingerprint import FORWARD, Fingerprint
from syncbn.runtime.base import Runtime, Solo


class TorchrunRuntime:
    """This process as a rank of the default process group, which must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks, in place."""
        dist.all_reduce(values)
        return values

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """See `Runtime.start_sum`.

        On a CPU it is summed at once, by the exchange of the layers: between ranks of one machine in a tenth of gloo's
        time, and a rank that does not come, or comes with something else, is an error.
        """
        if not values.is_cuda:
            group = dist.distributed_c10d._get_default_group()
            what = Fingerprint("the loop's own sum", len(values), values.dtype, False)
            total = exchange_of(group).gather(values, FORWARD, what).sum(0)
            return lambda: total
        work = dist.all_reduce(values, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return values

        return wait

    def from_main(self, values: Tensor) -> Tensor:
        """`values` of rank 0, in place on every rank."""
        dist.broadcast(values, src=0)
        return values

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's `values` (n,), in the order of ranks."""
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(values)
        longest = int(self.sum(sizes).max())
        rows = [values.new_empty(longest) for _ in range(self.world_size)]
        dist.all_gather(rows, torch.cat([values, values.new_zeros(longest - len(values))]))
        return [row[:size] for row, size in zip(rows, sizes.tolist(), strict=True)]

    def barrier(self) -> None:
        """Return when every rank has called it."""
        dist.barrier()

    def post(self, key: str, text: str) -> None:
        """Let every rank read `text` under `key`, in the store of the process group."""
        with suppress(RuntimeError, ValueError):  # the store, or the group, is gone
            dist.distributed_c10d._get_default_store().compare_set(key, "", text)

    def posted(self, key: str) -> str | None:
        """What a rank has posted under `key`, or None."""
        with suppress(RuntimeError, ValueError):
            store = dist.distributed_c10d._get_default_store()
            return store.get(key).decode() if store.check([key]) else None
        return None

    def solo(self) -> Solo:
        """This process as a world of one, on the same device."""
        return Solo(self.device)

    def close(self) -> None:
        """Destroy the default process group."""
        dist.destroy_process_group()


def from_environment(cfg: RunConfig) -> Runtime:
    """The runtime that the environment describes: torchrun's variables, or a process alone.

    Raises:
        UsageError: `train.device=cuda` without a GPU, a rank outside the world, or a world of several ranks
            where the config asks for another number.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if not 0 <= rank < world_size:
        raise UsageError(f"RANK={rank} is not allowed: 0 to WORLD_SIZE - 1 = {world_size - 1}")
    device = pick_device(cfg.train.device, int(os.environ.get("LOCAL_RANK", "0")))
    if "WORLD_SIZE" not in os.environ:
        return Solo(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=cfg.launcher.timeout_s))
    return TorchrunRuntime(device)


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means on this machine for `local_rank`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "train.device=cuda is not allowed here: torch sees no GPU; use cpu or auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
