"""A project's own conf/ lies over the packaged one: its options, its studies, its defaults."""

import pytest

from syncbn.cli.launching import launch
from syncbn.compare.study.repeat import repeat_command
from syncbn.compose import compose, config_files, config_folder, config_folders, vary
from syncbn.errors import UsageError

OWN = """
defaults:
  - base
  - _self_
  - override model: wide
seed: 3
train:
  steps: 7
"""
STUDY = """# @package _global_
name: own
train:
  steps: 9
study:
  question: Mine?
  seeds: [0, 1]
  factor: [norm]
  arms:
    local: [norm=local]
    sync: [norm=sync]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder that is a project, and the current one."""
    write(tmp_path, "conf/config.yaml", OWN)
    write(tmp_path, "conf/model/wide.yaml", "name: mlp\nhidden: [300]\n")
    write(tmp_path, "conf/model/cnn.yaml", "name: cnn\nwidth: 5\n")
    write(tmp_path, "conf/study/own.yaml", STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_project_there_is_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_folders() == [config_folder()]
    assert compose().train.steps == 600


@pytest.mark.parametrize(("given", "used"), [((), "journal"), (("tracking=mlflow",), "mlflow")])
def test_a_debug_run_goes_to_mlflow_where_it_is_asked_to(project, given, used):
    cfg = compose(["debug=tiny", *given])
    assert (cfg.tracking.name, cfg.train.steps) == (used, 2)


def test_a_checkouts_conf_is_not_laid_over_itself(monkeypatch):
    monkeypatch.chdir(config_folder().parent)
    assert config_folders() == [config_folder()]


def test_a_projects_defaults_take_the_place_of_ours(project):
    assert config_folders() == [project / "conf", config_folder()]
    cfg = compose()
    assert (cfg.seed, cfg.train.steps, cfg.model.hidden) == (3, 7, [300])
    assert (cfg.norm.name, cfg.data.name) == ("sync", "digits")


def test_the_command_line_wins_over_a_projects_defaults(project):
    cfg = compose(["model=mlp", "train.steps=1"])
    assert (cfg.model.hidden, cfg.train.steps) == ([100, 100], 1)


@pytest.mark.parametrize(
    ("study", "steps", "hidden"), [("own", 9, [300]), ("demo", 600, [100, 100])]
)
def test_a_study_wins_over_a_projects_defaults_where_it_says_something(
    project, study, steps, hidden
):
    cfg = compose([f"study={study}"])
    assert (cfg.name, cfg.train.steps, cfg.model.hidden, cfg.seed) == (study, steps, hidden, 3)


def test_a_projects_file_wins_over_ours_of_the_same_name(project):
    assert compose(["model=cnn"]).model.width == 5
    assert vary(compose(), ["model=cnn"]).model.width == 5
    assert config_files("model")["cnn"] == project / "conf" / "model" / "cnn.yaml"


def test_options_of_both_are_listed_where_one_is_unknown(project):
    assert {"own", "demo"} <= set(config_files("study"))
    with pytest.raises(UsageError, match=r"model=nope is not allowed: one of cnn, mlp, .*wide"):
        vary(compose(), ["model=nope"])
    with pytest.raises(UsageError, match=r"Available options.*mlp.*wide"):
        compose(["model=nope"])


def test_a_group_of_the_project_alone_can_be_varied_by(project):
    assert vary(compose(), ["model=wide"]).model.hidden == [300]


def test_a_projects_study_can_be_repeated_by_its_name(project):
    assert repeat_command(compose(["study=own"])) == "syncbn compare study=own"


@pytest.mark.parametrize("text", ["study: [", "[study]", "study: null\n", ""])
def test_a_broken_study_beside_it_does_not_keep_one_from_being_repeated(project, text):
    (project / "conf" / "study" / "broken.yaml").write_text(text)
    assert repeat_command(compose(["study=own"])) == "syncbn compare study=own"


def test_a_project_may_have_studies_alone(project):
    (project / "conf" / "config.yaml").unlink()
    cfg = compose(["study=own"])
    assert (cfg.train.steps, cfg.model.hidden) == (9, [100, 100])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("db: mysql\n", r"config\.yaml does not start from syncbn's own settings: .*base"),
        ("defaults: [\n", r"config\.yaml cannot be read"),
    ],
)
def test_a_config_that_is_not_ours_to_read_is_named(project, text, complaint):
    (project / "conf" / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=complaint):
        compose()


def test_a_folder_that_is_no_set_of_configs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_CONF", str(tmp_path))
    with pytest.raises(UsageError, match=r"no main\.yaml in .*set SYNCBN_CONF"):
        compose()
    with pytest.raises(UsageError, match=r"no main\.yaml in .*set SYNCBN_CONF"):
        launch("train", ["launcher.num_workers=2"], dry_run=False, as_json=False)
