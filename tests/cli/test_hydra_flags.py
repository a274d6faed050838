"""Who knows Hydra's own flags learns in one line what to use instead."""

import pytest

from syncbn.cli import cli
from syncbn.cli.guard import invoke
from syncbn.cli.hydra_flags import INSTEAD, explain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "--multirun", "study=demo"], "`syncbn sweep`"),
        (["compare", "-m"], "`syncbn sweep`"),
        (["train", "--cfg", "job"], "use --dry-run"),
        (["train", "--cfg=job"], "use --dry-run"),
        (["train", "-c", "job"], "use --dry-run"),
        (["sweep", "--info", "defaults"], "use --dry-run"),
        (["train", "--resolve"], "use --dry-run"),
        (["train", "--package", "optim"], "--dry-run --json"),
        (["train", "--config-name", "x"], "conf/config.yaml"),
        (["train", "-cn", "x"], "conf/config.yaml"),
        (["train", "-cd", "x"], "SYNCBN_CONF"),
        (["submit", "train", "--config-path=x"], "SYNCBN_CONF"),
        (["train", "--shell-completion", "install=bash"], "_SYNCBN_COMPLETE=bash_source"),
        (["studies", "--run"], "leave it out"),
    ],
)
def test_a_flag_of_hydras_says_what_to_use(arguments, said, capsys):
    assert invoke(cli, arguments, prog_name="syncbn") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_other_unknown_options_are_named_as_they_are(capsys):
    assert invoke(cli, ["train", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err


def test_no_flag_is_explained_twice():
    flags = [flag for row in INSTEAD for flag in row]
    assert len(flags) == len(set(flags))
    assert explain(["--max-restarts"], "--max-restarts") is None
