"""What a loader process hands to its rank: a batch, pickled before it is sent.

Torch pickles in a thread, which drops what cannot be pickled and leaves the rank waiting. Here it happens where an
error can be raised. Tensors lie in `/dev/shm`, from where the rank maps them; a batch that finds no room there, 64 MB
in a container unless it is given more, goes through memory of its own, which counts towards the container's alone.
"""

import os
import pickle
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import torch
from torch import Tensor

from syncbn.errors import UsageError
from syncbn.structure import mapped, tensors_of


@dataclass(frozen=True)
class SentBatch:
    """A batch on its way.

    Args:
        pickled: the batch with its tensors in `/dev/shm`; or the descriptor of a file with all of it.
        has_room: whether `/dev/shm` had room for the tensors.
    """

    pickled: bytes
    has_room: bool = True

    def received(self) -> Any:
        """The batch; for the receiving process, once.

        Raises:
            OSError, EOFError: the process that sent it is gone.
        """
        content = pickle.loads(self.pickled)  # noqa: S301 - of a process that we started
        if self.has_room:
            return content
        _warn()
        with os.fdopen(content.detach(), "rb") as file:
            file.seek(0)  # a descriptor shares its position with those it was copied from
            return pickle.load(file)  # noqa: S301

    def pin_memory(self) -> Any:
        """The batch in page-locked memory; called by torch."""
        return mapped(self.received(), Tensor.pin_memory)


def pickled(batch: Any) -> SentBatch:
    """`batch` ready to be sent.

    Raises:
        UsageError: it holds what cannot be sent to another process.
    """
    try:
        if _shared(batch):
            return SentBatch(bytes(ForkingPickler.dumps(batch)))
        return SentBatch(bytes(ForkingPickler.dumps(_written(batch))), has_room=False)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(
            f"a batch cannot be sent by a loader process ({error}): make it of tensors and plain values, or set "
            "data.num_loaders=0"
        ) from error


def _shared(batch: Any) -> bool:
    """Move the tensors of `batch` to `/dev/shm`; False where one finds no room, or no more open files."""
    try:
        for tensor in tensors_of(batch):
            if tensor.layout == torch.strided and tensor.untyped_storage().size():
                tensor.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        return False
    return True


def _written(batch: Any) -> Any:
    """A file in memory, without a name, that holds `batch`; as something that can be sent."""
    with os.fdopen(os.memfd_create("syncbn-batch"), "wb") as file:
        pickle.dump(batch, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
        return DupFd(file.fileno())


@cache
def _warn() -> None:
    """Say once what slows loaders down."""
    sys.stderr.write(
        "warning: /dev/shm has no room for the batches of loaders, which take a slower way: give a container more "
        "(docker run --shm-size=2g), or lower data.num_loaders or train.per_rank_batch\n"
    )
