"""Random numbers of code of extensions: decided by the run's seed and by where it is called, and by nothing else.

Code of an extension draws from the global generators of Python, numpy and torch. They are seeded anew for each sample
(`syncbn.data`) and for each call of a callback (`syncbn.callbacks`), and given back as they were. So what a sample
looks like depends neither on the rank that fetches it, nor on loader processes, nor on where a run was resumed, and
neither fetching nor observing changes the run's own random numbers. It costs about 20 us a sample or call.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Within, the global generators may be seeded and drawn from; afterwards they are as they were.

    Args:
        device: a GPU whose generator is given back too.
    """
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - others use it
    gpu = device if device is not None and device.type == "cuda" else None
    on_gpu = None if gpu is None else torch.cuda.get_rng_state(gpu)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(own)
        if gpu is not None and on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, gpu)


def seed_generators(seed: int) -> None:
    """Seed the global generators; those of GPUs are left alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def seed_of(*key: int | str) -> int:
    """32 bits that `key` decides, such as (seed, step, sample)."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=4).digest())
