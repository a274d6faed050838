"""`syncbn doctor`: whether this machine can train, and what to do where it cannot."""

from pathlib import Path

import click

from syncbn.cli.options import as_json


@click.command()
@click.option(
    "--runs-dir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The folder that runs are written to.",
)
@click.option(
    "--data-root",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="The folder of the data sets.",
)
@as_json
def doctor(runs_dir: Path, data_root: Path, as_json: bool) -> int:
    """Check this machine. The exit code is 1 where a check fails, 0 where at most a warning is left."""
    from dataclasses import asdict

    from syncbn.cli.guard import say
    from syncbn.launch.health import examine

    findings = examine(runs_dir, data_root)
    lines = [
        f"{f.verdict:<4} {f.subject:<16} {f.found}" + (f"\n     -> {f.advice}" if f.advice else "")
        for f in findings
    ]
    say([asdict(f) for f in findings], "\n".join(lines), as_json)
    return int(any(f.verdict == "FAIL" for f in findings))
