"""The plan of a launch: ranks, resources, files and the exact command.

A plan is a pure function of the config and of how it was asked for, so that `--dry-run` prints what a launch
follows and nothing else, without importing torch or Ray.
"""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from syncbn.compare.study.design import arms_of, most_processes
from syncbn.compare.sweep.design import Sweep
from syncbn.config import Config
from syncbn.tracking.redact import redact


@dataclass(frozen=True)
class Plan:
    """One launch of one verb.

    Args:
        verb: `train` (one run), `compare` (one study) or `sweep`.
        config: the composed config.
        overrides: the settings it was composed from, in the order given.
        sweep: its trials, where it is a sweep; `config` is then what these have in common.
    """

    verb: str
    config: Config
    overrides: tuple[str, ...]
    sweep: Sweep | None = None

    @property
    def command(self) -> str:
        """The command that starts it, quoted for a shell."""
        return shlex.join([*self._program(), self.verb, *map(_redacted, self.overrides)])

    def _program(self) -> list[str]:
        cfg = self.config
        if self.verb == "train" and cfg.launcher.name == "local" and self.num_ranks > 1:
            ranks = str(self.num_ranks)
            return ["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", "syncbn"]
        return ["syncbn"]

    @property
    def num_ranks(self) -> int:
        """Processes that train; of a study or sweep, those of its largest wave."""
        if self.sweep is not None:
            return self.sweep.most_processes
        return self.config.num_ranks if self.verb == "train" else most_processes(self.config)

    @property
    def resources(self) -> dict[str, Any]:
        """Ranks, and the CPUs, GPUs and threads they take together."""
        ranks, launcher = self.num_ranks, self.config.launcher
        return {
            "ranks": ranks,
            "cpus": ranks * launcher.cpus_per_worker,
            "gpus": ranks * launcher.gpus_per_worker,
            "threads_per_rank": self.config.train.num_threads,
            "where": _where(self.config),
        }

    @property
    def trials(self) -> list[str]:
        """Names of the trials of a study or sweep, `<arm>-<seed>`; none for a run."""
        if self.sweep is not None:
            return [trial.name for trial in self.sweep.trials]
        study = self.config.study
        return [f"{a.name}-{seed}" for a in arms_of(study) for seed in study.seeds] if study else []

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, without secrets."""
        plan: dict[str, Any] = {
            "command": self.command,
            "resources": self.resources,
            "files": str(Path(self.config.runs_dir) / self.config.name),
        }
        if self.trials:
            plan["trials"] = self.trials
        return plan | {"config": redact(asdict(self.config))}


def as_yaml(plan: dict[str, Any]) -> str:
    """What `Plan.to_dict` gives, as one YAML document."""
    return yaml.safe_dump(plan, sort_keys=False, width=100).rstrip()


def _where(cfg: Config) -> str:
    if cfg.launcher.name == "local":
        return "this machine"
    return f"the Ray cluster at {cfg.launcher.address or 'this machine, started for it'}"


def has_secrets(overrides: Sequence[str]) -> bool:
    """Whether a value in `overrides` is one that must not be written down, such as a password in a URL."""
    return any(_redacted(override) != override for override in overrides)


def _redacted(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{key}{equals}{redact(value, key)}"
