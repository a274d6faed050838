"""Which way the frames of a CPU group go."""

import os

from syncbn.norm.comm.transports.process_group import Wire
from syncbn.norm.comm.transports.shared_memory import SharedMemory
from syncbn.norm.comm.transports.sockets import MESH_RANKS, Mesh

WAYS = ("auto", "shared", "sockets", "gloo")
"""What `SYNCBN_EXCHANGE` may be set to: the best there is, or one of the ways."""


def ways(wire: Wire) -> tuple[SharedMemory | None, Mesh | None]:
    """What there is beside the group itself: shared memory where all ranks can map it, else connections; collective.

    Raises:
        ValueError: `SYNCBN_EXCHANGE` is not one of `WAYS`.
        RuntimeError: it is a way that some rank cannot go.
    """
    choice = os.environ.get("SYNCBN_EXCHANGE", "auto")
    if choice not in WAYS:
        raise ValueError(f"SYNCBN_EXCHANGE={choice!r} is not allowed: one of {', '.join(WAYS)}")
    # Every rank takes part, also one that wants neither: ranks that choose differently must agree too.
    memory = SharedMemory.over(wire, willing=choice in ("auto", "shared"))
    if memory is None and choice == "shared":
        raise RuntimeError(
            "SYNCBN_EXCHANGE=shared, but the ranks of this group cannot share memory"
        )
    if memory is not None:
        return memory, None
    mesh = Mesh.over(wire, willing=choice in ("auto", "sockets"))
    if mesh is None and choice == "sockets":
        raise RuntimeError(
            f"SYNCBN_EXCHANGE=sockets, but the ranks of this group cannot connect, or are more than {MESH_RANKS}"
        )
    return None, mesh
