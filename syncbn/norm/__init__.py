"""The layer: synchronised batch normalisation, on torch and the standard library alone.

`module` and `functional` check what they are given and call `ops`, which order a pass: `backends` do one rank's
arithmetic, `moments` merges ranks, and `comm` alone talks to other ranks.
"""

from syncbn.norm.backends.cpu import release_memory
from syncbn.norm.comm.fingerprint import RankLost, RanksDisagree
from syncbn.norm.convert import Conversion, convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.norm.ddp import ddp_buffers_to_ignore
from syncbn.norm.functional import NonFiniteStatistics, sync_batch_norm
from syncbn.norm.module import SyncBatchNorm
from syncbn.norm.recalibrate import recalibrate
from syncbn.norm.uneven_inputs import in_lockstep, join

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
