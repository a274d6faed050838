"""Flags of Hydra's own command line, and what does the same here.

A config is composed without `hydra.main`, so none of these exist; who knows them learns in one line what to use.
"""

from collections.abc import Sequence

INSTEAD = {
    ("--multirun", "-m"): "`syncbn sweep` runs every combination of key=a,b settings",
    ("--cfg", "-c"): "use --dry-run, which prints the whole config",
    ("--resolve",): "use --dry-run, which prints values resolved",
    ("--info", "-i"): "use --dry-run, which prints config, ranks and command",
    ("--package", "-p"): "use --dry-run --json, and take the part that you want",
    ("--run", "-r"): "leave it out",
    ("--config-name", "-cn"): (
        "a project's defaults are in its conf/config.yaml, and files of its groups are chosen as study=NAME, model=NAME"
    ),
    ("--config-path", "-cp"): (
        "configs are looked for in conf/ of the current folder; SYNCBN_CONF names a folder in place of the package's"
    ),
    ("--config-dir", "-cd"): (
        "configs are looked for in conf/ of the current folder; SYNCBN_CONF names a folder in place of the package's"
    ),
    ("--shell-completion", "-sc"): 'use eval "$(_SYNCBN_COMPLETE=bash_source syncbn)"',
    ("--experimental-rerun",): "give the command again, it continues or repeats the run",
    ("--hydra-help",): "use --help",
}
"""A flag with its short form, and the words for what to do instead."""


def explain(argv: Sequence[str], unknown: str) -> str | None:
    """What to use in place of the option `unknown` of `argv`, None where it is no flag of Hydra's.

    Args:
        argv: the arguments as given; click knows of `-cn` only its first letter.
        unknown: the option that click has refused.
    """
    names = [argument.partition("=")[0] for argument in argv if argument.startswith(unknown)]
    for flags, instead in INSTEAD.items():
        given = next((name for name in names if name in flags), None)
        if given is not None:
            return f"{given} is a flag of Hydra's, and not known here: {instead}"
    return None
