"""Pages of the documentation say what is there: the behaviour page names tests, the architecture page every package."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEHAVIOUR = (ROOT / "docs/behaviour.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
TOPICS = {topic.partition("\n")[0]: topic for topic in BEHAVIOUR.split("\n## ")[1:]}
FOLDERS = ("syncbn", "syncbn/norm")
"""Those whose modules stand on the architecture page one by one."""


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_of_the_behaviour_page_ends_with_files_that_hold_tests(topic: str) -> None:
    promises, _, last = TOPICS[topic].partition("\nTests: ")
    assert promises.strip().count("\n") > 1
    names = last.split()
    assert names, "a promise without a test"
    for name in names:
        path = re.fullmatch(r"`(tests/[\w/]+/test_\w+\.py)`,?", name)
        assert path, name
        assert "\ndef test_" in (ROOT / path[1]).read_text(), path[1]


def _packages_and_modules() -> set[str]:
    packages = {
        path.parent for path in ROOT.glob("syncbn/*/**/*") if path.suffix in (".py", ".cpp")
    }
    modules = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")]
    found = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    return found | {m.relative_to(ROOT).as_posix() for m in modules if m.name != "__init__.py"}


def test_the_architecture_page_names_every_package_and_none_that_is_not_there() -> None:
    named = set(re.findall(r"`(syncbn/[\w/.]*)`", ARCHITECTURE))
    assert _packages_and_modules() - named == set()
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_architecture_page_shows_the_layers_that_the_linter_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for container in ("syncbn", "syncbn.norm"):
        (layers,) = (
            contract["layers"]
            for contract in contracts["contracts"]
            if contract.get("containers") == [container]
        )
        shown = "\n".join(layers).replace(" | ", " · ")
        assert f"```\n{shown}\n```" in ARCHITECTURE
