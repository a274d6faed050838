"""Checks of what a machine needs to train.

Each check looks at one thing and returns a `Finding`; none changes anything, and none imports torch or Ray unless
that is what it looks at.
"""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@dataclass(frozen=True)
class Finding:
    """What a check found: `verdict` is OK, WARN or FAIL; `advice` says what to do about the last two."""

    subject: str
    verdict: str
    found: str
    advice: str = ""


def examine(runs_dir: Path, data_root: Path) -> list[Finding]:
    """All findings, in the order of the list below."""
    return [
        python(),
        *map(package, ("torch", "ray", "mlflow", "hydra-core")),
        gpu(),
        cpus(),
        shared_memory(SHARED_MEMORY),
        network_interface(),
        *(port(number, use) for number, use in ((5000, "syncbn ui"), (8265, "a Ray dashboard"))),
        data(data_root),
        writable(runs_dir),
        ray_token(),
    ]


def python() -> Finding:
    """Python 3.11 to 3.13."""
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "OK", found)
    return Finding("python", "FAIL", found, "use Python 3.11, 3.12 or 3.13")


def package(name: str) -> Finding:
    """Whether `name` is installed."""
    try:
        return Finding(name, "OK", version(name))
    except PackageNotFoundError:
        advice = f"pip install {'torch' if name == 'torch' else 'syncbn[service]'}"
        return Finding(name, "FAIL", "not installed", advice)


def gpu() -> Finding:
    """The GPUs that torch sees; none is fine, except for the arm `torch_sync`."""
    try:
        import torch
    except ImportError as error:
        return Finding("gpu", "FAIL", f"torch cannot be imported: {error}", "reinstall torch")
    count = torch.cuda.device_count()
    if count == 0:
        return Finding("gpu", "OK", "none: training runs on CPU, over gloo")
    return Finding("gpu", "OK", f"{count} x {torch.cuda.get_device_name(0)}")


def cpus() -> Finding:
    """Two ranks want two cores."""
    count = len(os.sched_getaffinity(0))
    if count >= 2:
        return Finding("cpus", "OK", str(count))
    return Finding("cpus", "WARN", str(count), "several ranks will share one core and be slow")


def shared_memory(folder: Path) -> Finding:
    """Room for Ray's object store and for data loaders."""
    if not folder.is_dir():
        return Finding(
            str(folder), "FAIL", "missing", "mount a tmpfs there (docker: --shm-size=2g)"
        )
    free = shutil.disk_usage(folder).free
    verdict = "OK" if free >= GIB else "WARN"
    advice = "" if verdict == "OK" else "give it at least 1 GiB (docker: --shm-size=2g)"
    return Finding(str(folder), verdict, f"{free / GIB:.1f} GiB free", advice)


def network_interface() -> Finding:
    """Gloo binds to the address that the host's name resolves to."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    if name is not None:
        known = [interface for _, interface in socket.if_nameindex()]
        if name in known:
            return Finding("gloo interface", "OK", f"GLOO_SOCKET_IFNAME={name}")
        advice = f"set it to one of {', '.join(known)}"
        return Finding("gloo interface", "FAIL", f"GLOO_SOCKET_IFNAME={name}", advice)
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        advice = "set GLOO_SOCKET_IFNAME to the interface that ranks reach each other through"
        return Finding("gloo interface", "WARN", "this host's name does not resolve", advice)
    return Finding("gloo interface", "OK", f"{socket.gethostname()} is {address}")


def port(number: int, use: str) -> Finding:
    """Whether `number` is free on the loopback interface for `use`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return Finding(
                f"port {number}", "WARN", "taken", f"{use} needs another, or is up already"
            )
    return Finding(f"port {number}", "OK", f"free for {use}")


def data(root: Path) -> Finding:
    """Whether there are data sets in `root`; digits needs none."""
    if not root.exists():
        advice = "data=digits needs none; for others set data.root, or data.download=true"
        return Finding("data root", "WARN", f"{root.resolve()} is missing", advice)
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        return Finding(
            "data root", "FAIL", f"{root.resolve()}", "make it a folder that you can read"
        )
    return Finding("data root", "OK", ", ".join(_folders(root)) or "empty")


def _folders(root: Path) -> Iterator[str]:
    return (path.name for path in sorted(root.iterdir()) if path.is_dir())


def writable(folder: Path) -> Finding:
    """Whether runs can be written to `folder`, and how much room there is."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            "runs folder", "FAIL", f"cannot write to {existing}", "set runs_dir elsewhere"
        )
    free = shutil.disk_usage(existing).free
    verdict, advice = ("OK", "") if free >= GIB else ("WARN", "free some space, or set runs_dir")
    return Finding("runs folder", verdict, f"{folder.resolve()}, {free / GIB:.1f} GiB free", advice)


def ray_token() -> Finding:
    """Whether there is a token for running clusters, in a file that nobody else can read."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("ray token", "OK", "RAY_AUTH_TOKEN is set")
    if path is None:
        return Finding("ray token", "OK", "none set: needed for running clusters only")
    if not os.access(path, os.R_OK):
        return Finding("ray token", "FAIL", f"cannot read {path}", "set RAY_AUTH_TOKEN_PATH anew")
    if Path(path).stat().st_mode & 0o077:
        return Finding("ray token", "WARN", f"{path} is open to others", f"chmod 600 {path}")
    return Finding("ray token", "OK", path)
