"""The command that repeats a study: it composes to the same study, and holds only what differs from the file."""

import shlex

from trial_files import study_config

from syncbn.compare.study.repeat import hydra_value, repeat_command
from syncbn.compose import compose
from syncbn.config import identity

OVERRIDES = [
    "study=demo",
    "launcher.num_workers=4",
    "train.steps=50",
    "study.seeds=[3,1]",
    "optim.clip_norm=1.5",
    "data=mnist",
    "data.root='a folder/it\\'s'",
    "+study.arms.slow=['norm=local','optim.lr=0.01']",
    "~study.arms.none",
    "model.hidden=[7]",
    "train.drop_last=false",
]


def test_the_command_in_the_report_repeats_the_study_exactly():
    cfg = compose(OVERRIDES)
    command = repeat_command(cfg)
    assert command.startswith("syncbn compare study=demo ")
    again = compose(shlex.split(command)[2:])
    assert identity(again) == identity(cfg)
    assert again.study == cfg.study


def test_the_command_of_an_unchanged_study_is_short():
    assert repeat_command(compose(["study=demo"])) == "syncbn compare study=demo"


def test_a_study_that_no_file_holds_has_no_command(tmp_path):
    assert repeat_command(study_config(tmp_path)) is None


def test_numbers_and_truth_values_keep_their_kind_in_overrides():
    value = {"a": [1, True, None, 0.5, 0, False], "b": "x: {y}"}
    assert hydra_value(value) == "{a:[1,true,null,0.5,0,false],b:'x: {y}'}"
