"""What the project says of itself holds: configs, make targets, the README's names, and how code is laid out."""

import ast
import functools
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from programs import torchrun

import syncbn
from syncbn.cli import VERBS
from syncbn.cli.launching import make_plan
from syncbn.compose import compose
from syncbn.keys import known_keys
from syncbn.launch.plan import Plan

pytestmark = pytest.mark.untraced
ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
CONFIGS = sorted(p.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml"))
MODULES = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in ("syncbn", "jobs", "tests", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
)
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md"))]
OWN_PROJECT = "docs/bring-your-own.md"
"""Its launches are those of a project; they and others with extensions are run by tests of their own."""
JOB = re.compile(
    r"(?:torchrun .*--nproc-per-node (\d+) -m syncbn|(?:^|\s)syncbn|python -m syncbn) (train|compare|sweep)(?=\s|$)(.*)"
)


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text())


def _functions(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(_tree(module)) if isinstance(node, kinds)]


def _commands(page: str) -> list[str]:
    """The lines of a page's `sh` blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def _plan(command: str) -> Plan | None:
    """What `command` would launch, checked as at the start of a launch; None where it is no launch."""
    job = JOB.search(command)
    if job is None:
        return None
    environ = {} if job[1] is None else torchrun(job[1])
    overrides = [word for word in shlex.split(job[3]) if word != "--dry-run"]
    return make_plan(job[2], overrides, environ)


def _make_targets() -> set[str]:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(rules)


NEEDS = {
    "model=timm": ["model.arch=resnet18"],
    "model=torchvision": ["model.arch=resnet18"],
    "norm=sync_group": ["launcher.num_workers=2"],
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_opens_with_a_command_that_composes_and_composes_alone(config: str) -> None:
    comments = [li for li in (CONF / config).read_text().splitlines() if li.startswith("# ")]
    commands = [li.split("Run me: ")[1].split("  ")[0] for li in comments if "Run me: " in li]
    assert commands, "the first lines say what the config is for, and `Run me: ...`"
    plan = _plan(commands[0])
    assert plan is not None, commands[0]
    group, _, option = config.removesuffix(".yaml").rpartition("/")
    choice = f"{group}={option}"
    assert not group or choice in plan.overrides
    if group and list(plan.overrides) != [choice]:
        compose([choice, *NEEDS.get(choice, [])])  # alone


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  make ([a-z-]+) +\S", shown.stdout, re.MULTILINE))
    assert listed == _make_targets()


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", (ROOT / page).read_text(), re.MULTILINE)
    assert {a or b for a, b in named} <= _make_targets()


@pytest.mark.parametrize("page", PAGES)
def test_every_launch_a_page_shows_can_be_planned(page: str) -> None:
    for line in _commands(page):
        if "extensions=" not in line and page != OWN_PROJECT:
            _plan(line)


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"(?:^|`)syncbn ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= set(VERBS)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_config_key_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / target).exists(), f"link to {target}"
    for path in re.findall(r"`((?:syncbn|conf|jobs|tests|docs|docker)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), f"path {path}"
    groups = {key.split(".")[0] for key in known_keys() if "." in key}
    for key in re.findall(rf"`((?:{'|'.join(sorted(groups))})\.\w+)[`=]", text):
        is_file = Path(key).suffix in (".py", ".yaml", ".safetensors")
        assert is_file or key in known_keys(), f"config key {key}"


def test_every_module_says_what_it_is_for() -> None:
    assert [module for module in MODULES if not ast.get_docstring(_tree(module))] == []


def test_no_file_is_too_long_to_read() -> None:
    lengths = {module: len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > 600} == {}


def test_functions_are_small() -> None:
    sizes = [
        node.end_lineno - node.lineno + 1
        for module in MODULES
        if module.startswith(("syncbn/", "jobs/"))
        for node in _functions(module)
        if node.end_lineno is not None
    ]
    assert statistics.median(sizes) <= 12
    assert statistics.quantiles(sizes, n=10)[-1] <= 35


def test_every_public_name_is_documented() -> None:
    for name in syncbn.__all__:
        assert (getattr(syncbn, name).__doc__ or "").strip(), name
    for module in (m for m in MODULES if m.startswith("syncbn/")):
        for node in _tree(module).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}: {node.name}"


def test_nobody_imports_from_a_layer_above() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
