"""A function run by ranks of this machine, and what it returned.

Ranks are plain processes, which find each other by a file and communicate over the loopback interface; values travel as
JSON. They end with the call: when one fails, the others are ended too.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(
    job: str,
    world_size: int = 1,
    threads: int = 1,
    environ: dict[str, str] | None = None,
    timeout_s: float = 1200,
    **arguments: Any,
) -> Any:
    """What `job` returns on rank 0.

    Args:
        job: "module:function" in this package; called on every rank.
        world_size: ranks; 1 makes no process group.
        threads: that torch may use, a rank.
        environ: environment variables to set besides.
        timeout_s: seconds until ranks are ended.
        arguments: keyword arguments of the function, and what it returns: values that JSON knows.

    Raises:
        RuntimeError: a rank failed, or was late.
    """
    given = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **(environ or {})}
    with tempfile.TemporaryDirectory() as folder:
        spec = {"job": job, "world_size": world_size, "folder": folder, "arguments": arguments}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.ranks", json.dumps(spec)]
        processes = [
            subprocess.Popen([*command, str(rank)], cwd=ROOT, env=os.environ | given)
            for rank in range(world_size)
        ]
        try:
            _wait(processes, job, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return json.loads((Path(folder) / "result.json").read_text())


def _wait(processes: list[subprocess.Popen[bytes]], job: str, timeout_s: float) -> None:
    """Return when all have ended well."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        raise RuntimeError(f"{job}: ranks ended with {codes} (None: still running)")


def _work(spec: dict[str, Any], rank: int) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(rank)
    if spec["world_size"] > 1:
        dist.init_process_group(
            "gloo",
            store=FileStore(f"{spec['folder']}/store", spec["world_size"]),
            rank=rank,
            world_size=spec["world_size"],
            timeout=timedelta(seconds=120),
        )
    module, _, function = spec["job"].partition(":")
    result = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**spec["arguments"])
    if rank == 0:
        (Path(spec["folder"]) / "result.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.barrier()  # who leaves first would break the connections of the others
        dist.destroy_process_group()


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]), int(sys.argv[2]))
