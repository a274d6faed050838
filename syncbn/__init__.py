"""syncbn: synchronised batch normalisation over torch.distributed, on CPU and GPU alike.

The public names of the layer, nothing else. They are loaded at first use, so that the command line, which
lives in this package too, can answer a typing error without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.norm import (
        Conversion,
        NonFiniteStatistics,
        RankLost,
        RanksDisagree,
        SyncBatchNorm,
        convert_sync_batchnorm,
        ddp_buffers_to_ignore,
        in_lockstep,
        join,
        recalibrate,
        release_memory,
        revert_sync_batchnorm,
        sync_batch_norm,
    )

__all__ = [
    "Conversion",
    "NonFiniteStatistics",
    "RankLost",
    "RanksDisagree",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "ddp_buffers_to_ignore",
    "in_lockstep",
    "join",
    "recalibrate",
    "release_memory",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("syncbn.norm"), name)
    raise AttributeError(f"module 'syncbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
