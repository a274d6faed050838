"""docs/bring-your-own.md runs as it stands: its files make a project, its commands train and come to a verdict."""

import json
import re
import shlex
import sys

import pytest
from programs import ROOT, SYNCBN, losses
from programs import torchrun as of_torchrun

from syncbn.cli.launching import make_plan
from syncbn.compare.advice import error_study

pytestmark = pytest.mark.untraced
PAGE = (ROOT / "docs/bring-your-own.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# ([\w/.]+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
LAUNCH = re.compile(r"(torchrun .*-m )?syncbn (train|compare|advise)(.*)")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture
def project(bench):
    """The page's files in an empty folder; what a test imports of them is forgotten."""
    for name, text in FILES.items():
        path = bench.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield bench
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_what_is_registered_takes_twenty_lines():
    code = [line for line in FILES["mine.py"].splitlines() if line.strip()]
    assert len(code) <= 20


def test_every_launch_of_the_page_composes_with_its_own_names(
    project, monkeypatch, own_registrations
):
    monkeypatch.chdir(project.folder)
    monkeypatch.syspath_prepend(str(project.folder))
    launches = [match for line in COMMANDS if (match := LAUNCH.match(line))]
    assert len(launches) == 8
    for torchrun, verb, rest in (match.groups() for match in launches):
        words = [word for word in shlex.split(rest) if word != "--dry-run"]
        if verb == "advise":
            verb, words = "compare", error_study(words, 2)
        plan = make_plan(verb, words, of_torchrun() if torchrun else {})
        assert (plan.config.model.name, plan.config.data.name) == ("net", "scans")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_leads_from_an_empty_folder_to_a_verdict(project):
    for line in COMMANDS:
        if not LAUNCH.match(line):
            continue
        words = shlex.split(line.replace("torchrun", shlex.join(TORCHRUN)))
        words = [*SYNCBN, *words[1:]] if words[0] == "syncbn" else words
        done = project.run(*words)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    runs = project.folder / "runs"
    assert losses(runs / "two") == losses(runs / "three") == losses(runs / "four")
    summary = json.loads((runs / "two-a-rank" / "summary.json").read_text())
    assert [claim["verdict"] for claim in summary["claims"]] != []
