"""`syncbn new` makes a project whose files parse, fit each other and compose."""

import ast
import json
import sys

import pytest
import yaml
from programs import SYNCBN, complaint

FILES = [
    ".gitignore",
    "README.md",
    "conf/config.yaml",
    "conf/study/mine.yaml",
    "mine.py",
    "test_mine.py",
]


@pytest.fixture
def project(bench):
    """The folder of a new project, `mine`."""
    result = bench.call("new", "mine", "--json")
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["folder"] == str(bench.folder / "mine")
    assert sorted(made["files"]) == FILES
    return bench.folder / "mine"


def test_a_project_has_its_files_and_none_has_a_gap_left(project):
    paths = sorted(path for path in project.rglob("*") if path.is_file())
    assert [path.relative_to(project).as_posix() for path in paths] == FILES
    for path in paths:
        text = path.read_text()
        assert "NAME" not in text
        if path.suffix == ".py":
            assert ast.get_docstring(ast.parse(text))
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(text), dict)
            assert "Run me: syncbn " in text
    assert len((project / "README.md").read_text().splitlines()) == 10


@pytest.mark.slow
def test_a_new_project_passes_its_own_test_and_trains_on_two_ranks(bench, project):
    tested = bench.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)
    assert tested.returncode == 0, tested.stdout
    job = ("launcher.num_workers=2", "tracking=journal", "train.steps=40", "--json")
    trained = bench.run(*SYNCBN, "train", *job, cwd=project)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    assert summary["world_size"] == 2
    assert summary["final"]["test_error"] < 0.5  # at random: 0.67


@pytest.mark.usefixtures("own_registrations")
def test_the_study_of_a_new_project_composes_with_its_own_names(bench, project):
    planned = bench.call("compare", "study=mine", "--dry-run", "--json", cwd=project)
    assert planned.returncode == 0, planned.stderr
    config = json.loads(planned.stdout)["config"]
    assert (config["name"], config["train"]["per_rank_batch"]) == ("mine-study", 2)
    assert (config["model"]["name"], config["data"]["name"]) == ("mine_net", "mine_shapes")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two words", "names a Python module"),
        ("a-b", "names a Python module"),
        ("../up", "names a Python module"),
        ("class", "names a Python module"),
        ("_x", "names a Python module"),
        ("json", "a module of that name is installed"),
        ("torch", "a module of that name is installed"),
        ("demo", "there is a study of that name"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(bench, name, reason):
    result = bench.call("new", name)
    assert result.returncode == 2
    assert reason in complaint(result)
    assert not list(bench.folder.iterdir())


def test_what_is_there_already_is_left_alone(bench):
    (bench.folder / "mine").mkdir()
    assert bench.call("new", "mine").returncode == 0
    (bench.folder / "mine" / "mine.py").write_text("my work\n")
    result = bench.call("new", "mine")
    assert result.returncode == 2
    assert "exists" in complaint(result)
    assert (bench.folder / "mine" / "mine.py").read_text() == "my work\n"
