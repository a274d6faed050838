"""`syncbn new` makes a project whose files parse, fit each other and compose."""

import ast
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest
import torch
import yaml
from programs import SYNCBN, complaint

from syncbn.compose import compose

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
    result = bench.run(*SYNCBN, "new", "mine", "--json")
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


def test_the_config_chooses_what_the_module_registers(project, monkeypatch):
    registered = _registered(project, monkeypatch)
    tree = yaml.safe_load((project / "conf" / "config.yaml").read_text())
    assert tree["extensions"] == ["mine"]
    for group, (name, _) in registered.items():
        assert {f"override {group}": name} in tree["defaults"]


def test_the_network_learns_the_data(project, monkeypatch):
    registered = _registered(project, monkeypatch)
    (_, net), (_, shapes) = registered["model"], registered["data"]
    torch.manual_seed(0)
    train, test = shapes(project, "train"), shapes(project, "test")
    network = net((1, 8, 8), train.num_classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for batch in torch.randperm(len(train))[:1200].split(32):
        loss = torch.nn.functional.cross_entropy(network(train.images[batch]), train.targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    wrong = network(test.images).argmax(1) != test.targets
    assert wrong.float().mean() < 0.3  # at random: 0.67


def _registered(project, monkeypatch):
    """What the module registers, by group: (name, function)."""
    found = {}
    extend = ModuleType("syncbn.extend")
    for group in ("model", "data"):
        setattr(extend, group, _recording(group, found))
    monkeypatch.setitem(sys.modules, "syncbn.extend", extend)
    monkeypatch.setattr("syncbn.extend", extend, raising=False)
    spec = spec_from_file_location("mine", project / "mine.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module_from_spec(spec))
    return found


def _recording(group, found):
    def register(name):
        def decorate(build):
            found[group] = (name, build)
            return build

        return decorate

    return register


def test_the_configs_compose(project, monkeypatch):
    """With files that stand for what the extension registers."""
    config = project / "conf" / "config.yaml"
    config.write_text(config.read_text().replace("extensions: [mine]\n", ""))
    for group, option, name in (("model", "mine_net", "cnn"), ("data", "mine_shapes", "synthetic")):
        (project / "conf" / group).mkdir()
        (project / "conf" / group / f"{option}.yaml").write_text(f"name: {name}\n")
    monkeypatch.chdir(project)
    cfg = compose()
    assert (cfg.name, cfg.model.name, cfg.data.name) == ("mine", "cnn", "synthetic")
    study = compose(["study=mine"])
    assert (study.name, study.train.per_rank_batch) == ("mine-study", 2)
    assert study.model.name == "cnn"


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
    result = bench.run(*SYNCBN, "new", name)
    assert result.returncode == 2
    assert reason in complaint(result)
    assert not list(bench.folder.iterdir())


def test_what_is_there_already_is_left_alone(bench):
    (bench.folder / "mine").mkdir()
    assert bench.run(*SYNCBN, "new", "mine").returncode == 0
    (bench.folder / "mine" / "mine.py").write_text("my work\n")
    result = bench.run(*SYNCBN, "new", "mine")
    assert result.returncode == 2
    assert "exists" in complaint(result)
    assert (bench.folder / "mine" / "mine.py").read_text() == "my work\n"
