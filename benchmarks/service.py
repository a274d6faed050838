"""What the service costs around a training step: its loop against one written by hand, ways of training, its start.

    python -m benchmarks.service [--brief] [RESULT.json]     # 8 minutes on 2 quiet cores; prints tables

Both loops run in the same ranks, process group and threads, and take turns by blocks of steps. The service's is the
object that `syncbn train` runs on each rank, agreements between ranks included. Norm layers, networks and data are
equal.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import by_hand, machine, page, ranks
from benchmarks.clock import interleaved, say, words
from benchmarks.contenders import Run
from syncbn.compose import compose
from syncbn.config import Config
from syncbn.data import load_data
from syncbn.models import build_model
from syncbn.runtime import TorchrunRuntime
from syncbn.tracking import Journal, Tracker, Untracked, read_journal
from syncbn.train.loop import Loop
from syncbn.train.state import build
from syncbn.train.stopping import StopRequest

BLOCK = 10
"""Steps of a turn; as many as between two agreements, so that each turn of the service has one."""
ENDLESS = (
    "train.steps=1000000000",
    "train.checkpoint_every_s=0",
    "optim.schedule=constant",
    "launcher.num_workers=2",
)
SILENT = ("train.log_every=1000000000",)
CASES = {
    "resnet18": ("model=resnet18", "data=synthetic", "data.image_size=64", "train.per_rank_batch=8", "optim.lr=0.01"),
    "mlp": ("model=mlp", "data=digits", "train.per_rank_batch=2"),
}  # fmt: skip
WAYS = {
    "float32": (),
    "bf16": ("train.precision=bf16",),
    "channels_last": ("train.channels_last=true",),
    "bf16, channels_last": ("train.precision=bf16", "train.channels_last=true"),
    "compile": ("train.compile=true",),
}


def measure(case: str, budget_s: float) -> dict[str, Any]:
    """Median milliseconds of a step of the service and of the loop by hand; called on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        silent = compose([*CASES[case], *ENDLESS, *SILENT])
        logging = compose([*CASES[case], *ENDLESS, "train.log_every=10"])
        runs = {
            "by_hand": _block(_steps_by_hand(silent)),
            "service": _block(_steps(silent, Untracked())),
            "service_journal": _block(_steps(logging, Journal(Path(folder) / "journal.jsonl"))),
        }
        return _timed(case, silent, runs, budget_s)


def ways(case: str, names: list[str], budget_s: float) -> dict[str, Any]:
    """Median milliseconds of a step of the service by ways of training of the same network; called on every rank."""
    cfgs = {name: compose([*CASES[case], *ENDLESS, *SILENT, *WAYS[name]]) for name in names}
    runs = {name: _block(_steps(cfg, Untracked())) for name, cfg in cfgs.items()}
    return _timed(case, cfgs[names[0]], runs, budget_s)


def _timed(case: str, cfg: Config, runs: Mapping[str, Run], budget_s: float) -> dict[str, Any]:
    timed = interleaved(runs, budget_s)
    timed["ms"] = {name: ms / BLOCK for name, ms in timed["ms"].items()}
    say(f"{case} {words(timed)}")
    return {"case": case, "global_batch": cfg.global_batch, **timed}


def _block(steps: Iterator[object]) -> Run:
    def run() -> None:
        for _ in range(BLOCK):
            next(steps)

    return run


def _steps(cfg: Config, tracker: Tracker) -> Iterator[int]:
    """The steps of the service's own loop."""
    state = build(cfg, TorchrunRuntime(torch.device("cpu")))
    return Loop(state, tracker, StopRequest()).steps()


def _steps_by_hand(cfg: Config) -> Iterator[object]:
    sets = load_data(cfg.data, cfg.seed)
    images, labels = next(iter(sets.train.batches([torch.arange(len(sets.train))])))
    network = build_model(cfg.model, sets.shape, sets.num_classes, cfg.seed)
    return by_hand.steps(network, images, labels, cfg.train.per_rank_batch, cfg.optim.lr)


def loops(scale: float) -> list[dict[str, Any]]:
    """Rows of the two loops, a network each."""
    return [
        _middle_of(max(1, round(3 * scale)), "resnet18", 40 * scale),
        _middle_of(max(1, round(5 * scale)), "mlp", 20 * scale),
    ]


def _middle_of(num_pairs: int, case: str, budget_s: float) -> dict[str, Any]:
    """The row of the pair of ranks with the middle ratio, and the ratios of all: pairs differ by a few per cent."""
    rows = [ranks.run("service:measure", 2, case=case, budget_s=budget_s) for _ in range(num_pairs)]
    rows.sort(key=_share)
    return rows[num_pairs // 2] | {"shares": [round(_share(row), 3) for row in rows]}


def _share(row: Mapping[str, Any]) -> float:
    return row["ms"]["by_hand"] / row["ms"]["service"]


def ways_of_training(scale: float) -> list[dict[str, Any]]:
    """A row of ways of training; a brief one leaves the compiler out, which takes a minute to compile."""
    names = [name for name in WAYS if name != "compile" or scale == 1]
    return [ranks.run("service:ways", 2, case="resnet18", names=names, budget_s=45 * scale)]


def starts(scale: float) -> list[dict[str, Any]]:
    """A row of the start of a local run of two ranks: the least of several, for each kind of tracking."""
    num_runs = max(1, round(3 * scale))
    return [
        {
            "tracking": tracking,
            "runs": num_runs,
            **_least([_start(tracking) for _ in range(num_runs)]),
        }
        for tracking in ("journal", "mlflow")
    ]


def _least(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(min(times[name] for times in found), 2) for name in found[0]}


def _start(tracking: str) -> dict[str, float]:
    """Seconds to the end of the first step and of the run, and of processor time, of `syncbn train` with one step."""
    settings = ("launcher.num_workers=2", "train.steps=1", f"tracking={tracking}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "syncbn", "train", *settings, f"runs_dir={folder}"]
        before, began = _cpu_of_descendants(), time.time()
        subprocess.run(command, cwd=ranks.ROOT, check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        records = read_journal(Path(folder) / "run" / "journal.jsonl")
        first = next(record["time"] for record in records if record.get("step") == 1)
        return {
            "first_step_s": first - began,
            "run_s": ended - began,
            "cpu_s": _cpu_of_descendants() - before,
        }


def _cpu_of_descendants() -> float:
    """Processor seconds of all descendants that have ended, once all have, also those whose parents ended before."""
    adopt_orphans = 36  # PR_SET_CHILD_SUBREAPER
    ctypes.CDLL(None).prctl(adopt_orphans, 1)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure, print the tables, and write what was measured where a file is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service")
    parser.add_argument("--brief", action="store_true", help="a minute; without the compiler")
    parser.add_argument("result", nargs="?", type=Path, metavar="RESULT.json")
    options = parser.parse_args()
    scale, began = (0.1 if options.brief else 1.0), time.perf_counter()
    about = machine.describe()
    results = {"service": loops(scale), "ways": ways_of_training(scale), "start": starts(scale)}
    about["load_after"] = round(os.getloadavg()[0], 1)
    results |= {"machine": about, "seconds": round(time.perf_counter() - began)}
    print("\n\n".join(page.service_parts(results)))
    print(f"\ntook {results['seconds']} s, load {about['load_before']} to {about['load_after']}")
    if options.result is not None:
        options.result.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
