"""Checkpoints: saved whole or not at all, verified before they are parsed, matched to the run before they are used.

Nothing here knows of ranks: rank 0 saves, and the training loop gathers random states and distributes weights.
"""

from syncbn.checkpoint.background import Background
from syncbn.checkpoint.format import Meta
from syncbn.checkpoint.host_copy import HostCopy
from syncbn.checkpoint.match import check_matches, restore_model, restore_optimizer
from syncbn.checkpoint.runlock import FolderInUse, RunLock
from syncbn.checkpoint.store import Checkpoint, load, load_best, load_latest, save

__all__ = [
    "Background",
    "Checkpoint",
    "FolderInUse",
    "HostCopy",
    "Meta",
    "RunLock",
    "check_matches",
    "load",
    "load_best",
    "load_latest",
    "restore_model",
    "restore_optimizer",
    "save",
]
