"""The `Runtime` protocol (rank, world size, device), with torchrun and Ray behind it.

The training loop sees only a `Runtime`; whatever started the processes has assigned their ranks.
"""

from syncbn.runtime.base import Runtime, Solo
from syncbn.runtime.local import TorchrunRuntime, from_environment

__all__ = ["Runtime", "Solo", "TorchrunRuntime", "from_environment"]
