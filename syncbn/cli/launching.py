"""What `train`, `compare` and `sweep` share: overrides become a checked plan, and the plan is printed or followed.

The config is checked before torch or Ray is imported, so that a mistake is answered at once.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

from syncbn.cli.environment import refuse_other_size, use_mlflow_variables, world_size
from syncbn.cli.guard import invoke, logged, say
from syncbn.cli.torchrun import refuse_mistake_again
from syncbn.compare.study.preflight import refuse_unfit
from syncbn.compare.sweep.design import sweep_of
from syncbn.compose import compose, config_files, named_extensions
from syncbn.config import Config, TrainConfig
from syncbn.errors import UsageError
from syncbn.launch.forks import start_server
from syncbn.launch.plan import Plan, as_yaml
from syncbn.layout import require_folders
from syncbn.registry import TASKS


def launch(verb: str, overrides: Sequence[str], dry_run: bool, as_json: bool) -> None:
    """Plan `verb` (`train`, `compare` or `sweep`) with `overrides`; print the plan, or follow it and print the outcome.

    Raises:
        SyncbnError: the overrides cannot be used, or the run failed.
    """
    if not dry_run:
        refuse_mistake_again(os.environ)
        _start_early(overrides)
    plan = make_plan(verb, overrides, os.environ)
    if dry_run:
        say_on_main(plan.to_dict(), as_yaml(plan.to_dict()), as_json)
        return
    with logged(plan.config.folder), redirect_stdout(sys.stderr) if as_json else nullcontext():
        summary = follow(plan)
    say_on_main(summary, _in_words(plan, summary), as_json)
    if plan.verb == "sweep":
        from syncbn.launch.sweep import raise_failures

        raise_failures(summary)


def _start_early(overrides: Sequence[str]) -> None:
    """Let what ranks come from start while extensions, which import torch as well, are loaded here: 2 s."""
    keys = {key: value for key, _, value in (one.partition("=") for one in overrides)}
    if "WORLD_SIZE" in os.environ or not named_extensions(overrides):
        return
    if keys.get("launcher") == "ray":
        if "launcher.address" not in keys and "RAY_ADDRESS" not in os.environ:
            import_module("syncbn.launch.ray_servers").start_early()
    elif keys.get("launcher.num_workers", "1") != "1":
        start_server(TrainConfig().num_threads)  # ranks set their own


def make_plan(verb: str, overrides: Sequence[str], environ: Mapping[str, str]) -> Plan:
    """The plan for `verb`; under torchrun, its world size takes the place of `launcher.num_workers`.

    MLflow's variables in `environ` stand for `tracking.uri` and `tracking.experiment` where these are not set.

    Raises:
        UsageError: overrides that cannot be used, alone or with torchrun's environment.
    """
    size = world_size(environ)
    if size is not None:
        refuse_other_size(overrides, size)
    of_torchrun = [] if size is None else [f"launcher.num_workers={size}"]
    sweep = sweep_of(overrides, of_torchrun) if verb == "sweep" else None
    cfg = compose([*overrides, *of_torchrun]) if sweep is None else sweep.config
    _refuse_wrong_verb(verb, cfg)
    if size is not None:
        _refuse_under_torchrun(verb, cfg, size)
    use_mlflow_variables([cfg, *(t.config for t in (sweep.trials if sweep else ()))], environ)
    return Plan(verb, cfg, tuple(overrides), sweep)


def follow(plan: Plan) -> dict[str, Any]:
    """Start what `plan` says and return its summary as plain values.

    Raises:
        SyncbnError: the data's folder is missing, which on a cluster its nodes find out, or the run failed.
    """
    if plan.config.launcher.address is None:
        trials = plan.sweep.trials if plan.sweep is not None else ()
        for data in [plan.config.data, *(trial.config.data for trial in trials)]:
            require_folders(data)
    on_ray = plan.config.launcher.name == "ray"
    if plan.verb == "compare" and not on_ray and plan.config.task.name not in TASKS.built_in:
        import_module("syncbn.compare.study.rehearsal").refuse_ungiven(plan.config)
    if not on_ray and plan.num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        start_server(plan.config.train.num_threads)  # first: it imports torch while we do
    launcher = import_module("syncbn.launch.ray_runs" if on_ray else "syncbn.launch.local")
    if plan.sweep is not None:
        return launcher.launch_sweep(plan.sweep)
    if plan.verb == "compare":
        return launcher.launch_study(plan.config)
    return launcher.launch_run(plan.config).to_dict()


def say_on_main(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        say(value, text, as_json)


def _refuse_wrong_verb(verb: str, cfg: Config) -> None:
    if verb == "compare" and cfg.study is None:
        raise UsageError(f"compare needs study=NAME; studies: {', '.join(config_files('study'))}")
    if verb != "compare" and cfg.study is not None:
        one = "one run" if verb == "train" else "one run in each combination"
        raise UsageError(f"{verb} runs {one} and takes no study; give it to compare")
    if cfg.study is not None:
        refuse_unfit(cfg, cfg.study)


def _refuse_under_torchrun(verb: str, cfg: Config, size: int) -> None:
    if verb != "train":
        raise UsageError(f"{verb} starts its own ranks: run it with python, not with torchrun")
    if cfg.launcher.name == "ray":
        raise UsageError("launcher=ray starts its own ranks: run it with python, not with torchrun")
    if cfg.norm.name == "big_batch" and size > 1:
        raise UsageError(
            f"norm=big_batch is one process that takes the whole batch, and torchrun started {size}: "
            f"run it with python and launcher.num_workers={size}"
        )


def _in_words(plan: Plan, summary: Mapping[str, Any]) -> str:
    """One line on how it ended and where to look."""
    folder = plan.config.folder
    if plan.sweep is not None:
        return f"sweep {plan.config.name}: {len(plan.trials)} trials -> {folder / 'report.md'}"
    if plan.verb == "compare":
        return f"study {plan.config.name}: {len(plan.trials)} trials -> {folder / 'report.md'}"
    last = {n: x for n, x in summary["final"].items() if not n.startswith("best_")}
    final = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    return (
        f"run {plan.config.name}: {summary['steps']} steps in {summary['seconds']:.1f} s "
        f"on {summary['world_size']} rank(s); {final}{_best_in_words(summary['final'])} -> {folder / 'summary.json'}"
    )


def _best_in_words(final: Mapping[str, float]) -> str:
    """Which step did best and is kept, where one is."""
    if "best_step" not in final:
        return ""
    [(name, value)] = [
        (n.removeprefix("best_"), x)
        for n, x in final.items()
        if n.startswith("best_") and n != "best_step"
    ]
    return (
        f"; best test_{name} {value:.4g} at step {final['best_step']:.0f}, kept as checkpoints/BEST"
    )


def main(verb: str, argv: Sequence[str] | None = None) -> int:
    """The entry point of jobs/<verb>.py: its exit code."""
    command = getattr(import_module(f"syncbn.cli.{verb}"), verb)
    return invoke(command, sys.argv[1:] if argv is None else argv, prog_name=f"{verb}.py")
