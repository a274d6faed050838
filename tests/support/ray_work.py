"""What ranks do in the tests of failures on Ray, and a driver that lets them."""

import json
import os
import signal
import sys

import torch

from syncbn.compose import compose
from syncbn.errors import DataError, SyncbnError, exit_code
from syncbn.launch.ray_access import prepare_environment

CASES = ("says_why", "bug", "dies")


def work(cfg, runtime):
    """Rank 1 fails in the way that the run is named after, while rank 0 waits for it in a collective."""
    if runtime.rank == 1:
        if cfg.name == "says_why":
            raise DataError("rank 1 has no data")
        if cfg.name == "bug":
            raise KeyError("missing")
        if cfg.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
    runtime.sum(torch.ones(1))


def outcome(cfg, cluster):
    """What came of `cfg`: `[exit code, message]`."""
    from syncbn.launch.ray_ranks import fit

    try:
        fit(cfg, work, 2, str, cluster)
    except SyncbnError as error:
        return [exit_code(error), str(error)]
    return [0, ""]


def main():
    """Run every case on one local cluster and print what came of each."""
    cfg = compose(["launcher=ray", "launcher.num_workers=2", f"runs_dir={sys.argv[1]}"])
    address = prepare_environment(cfg)
    from syncbn.launch.ray_cluster import connected

    outcomes = {}
    with connected(cfg, 2, address) as cluster:
        for cfg.name in CASES:
            outcomes[cfg.name] = outcome(cfg, cluster)
    sys.stdout.write("\n" + json.dumps(outcomes))


if __name__ == "__main__":
    import ray_work

    ray_work.main()  # under its own name, so that workers can import it
