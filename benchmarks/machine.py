"""The machine that a result was measured on, as far as it matters for the numbers and without naming a user."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from syncbn.norm import native
from syncbn.provenance import git_revision


def describe() -> dict[str, Any]:
    """Processor, cores, caches, memory, versions, date, and how busy the machine was."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "l2_bytes": l2_bytes(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__.split("+")[0],
        "simd": torch.backends.cpu.get_cpu_capability(),
        "native": native.library() is not None,
        "revision": git_revision(),
        "load_before": round(os.getloadavg()[0], 1),
    }


def cpu_model(cpuinfo: str) -> str:
    """The processor's name in the text of /proc/cpuinfo."""
    found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else "unknown"


def l2_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of a core's own level-2 cache; 1 MiB where the system does not say."""
    for index in folder.glob("index*"):
        if (index / "level").read_text().strip() == "2":
            return int((index / "size").read_text().strip().rstrip("K")) * 1024
    return 2**20


def slug(machine: dict[str, Any]) -> str:
    """Date, processor and cores as a file name."""
    words = re.sub(r"\(r\)|\(tm\)|processor|cpu", " ", machine["cpu"].lower())
    name = "-".join(re.findall(r"[a-z0-9]+", words)) or "cpu"
    return f"{machine['date']}-{name}-{machine['cores']}-cores"
