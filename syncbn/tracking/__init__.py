"""Tracking: a local journal first (JSON lines), MLflow fed from it.

The journal file *is* the queue. Training only appends lines to it; whatever ships them to MLflow follows the file, in a
thread or another process, and can start again from its first line because shipping a record twice changes nothing.
"""

from syncbn.tracking.journal import Journal, Tracker, Untracked, read_journal

__all__ = ["Journal", "Tracker", "Untracked", "read_journal"]
