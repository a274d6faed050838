"""The wheel works without a checkout: it carries the configs, and every verb finds them in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from programs import ROOT, Bench

SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "conf", "syncbn")
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
"""The native library is optional, and takes a minute."""
TINY = ("debug=tiny", "launcher.num_workers=1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What a clean checkout holds of the package."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SOURCES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / name, **({"ignore": ignored} if path.is_dir() else {}))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel, built offline."""
    out = tmp_path_factory.mktemp("wheel")
    build(source, "-m", "pip", "--disable-pip-version-check", "wheel", ".", "--no-index",
          "--no-build-isolation", "--no-deps", "--wheel-dir", str(out))  # fmt: skip
    [path] = out.glob("syncbn-*.whl")
    return path


@pytest.fixture
def installed(wheel, tmp_path):
    """A bench whose programs import the package from the wheel, and whose folder is empty."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    bench = Bench(tmp_path / "empty", environ={"PYTHONPATH": str(site)})
    bench.folder.mkdir()
    yield bench
    bench.kill_all()


def build(source, *arguments):
    command = [sys.executable, *arguments]
    environ = os.environ | NO_COMPILER
    done = subprocess.run(command, cwd=source, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run(bench, *arguments):
    result = bench.run(sys.executable, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_wheel_has_every_config_and_template_and_nothing_beside_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"syncbn/conf/{name}" for name in files(ROOT / "conf")} <= names
    assert {f"syncbn/templates/{name}" for name in files(ROOT / "syncbn" / "templates")} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"syncbn"}


def test_a_source_distribution_builds_the_same_wheel(source, tmp_path):
    build(
        source,
        "-c",
        f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})",
    )
    [archive] = tmp_path.glob("syncbn-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for name in ("conf", "syncbn/templates", "syncbn/norm/native"):
        assert files(ROOT / name) - {
            f for f in files(ROOT / name) if f.endswith((".so", ".pyc"))
        } <= files(unpacked / name)


def test_a_config_composes_in_an_empty_folder(installed):
    code = (
        "import json, syncbn; from syncbn.compose import compose, config_folders;"
        "cfg = compose(['study=demo', 'model=cnn']);"
        "print(json.dumps([syncbn.__file__, *map(str, config_folders()), cfg.model.name]))"
    )
    file, folder, model = json.loads(run(installed, "-c", code))
    site = Path(installed.environ["PYTHONPATH"])
    assert (Path(file).parent, Path(folder)) == (site / "syncbn", site / "syncbn" / "conf")
    assert model == "cnn"


PLANS = """
import sys
from syncbn.cli import cli
from syncbn.cli.guard import invoke
for words in ("train norm=local", "compare study=demo", "studies --tier fast", "advise launcher.num_workers=2",
              "submit train"):
    assert invoke(cli, [*words.split(), "--dry-run", "--json"]) == 0, words
    print("===")
sys.exit(invoke(cli, ["new", "mine"]))
"""


def test_every_verb_that_plans_finds_its_configs(installed):
    *plans, _ = run(installed, "-c", PLANS).split("===\n")
    assert all(json.loads(plan) for plan in plans)
    site, sent = Path(installed.environ["PYTHONPATH"]), json.loads(plans[-1])
    assert (sent["working_dir"], sent["py_modules"]) == (None, [str(site / "syncbn")])
    assert (installed.folder / "mine" / "mine.py").is_file()


@pytest.mark.slow
def test_ranks_of_torchrun_and_studies_start_from_it(installed):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(installed, *torchrun, "-m", "syncbn", "train", "debug=tiny")
    assert (installed.folder / "runs" / "run" / "summary.json").is_file()
    run(
        installed,
        "-m",
        "syncbn",
        "studies",
        "demo",
        *TINY,
        "study.seeds=[0,1]",
        "train.eval_every=0",
    )
    assert (installed.folder / "runs" / "demo" / "report.html").is_file()
    [start] = _events(installed.folder / "runs" / "run" / "journal.jsonl", "start")
    assert not start["git"]  # no revision of whatever repository is around an installed package


AUDIT = """
import os, sys
def _refuse_checkout(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(CHECKOUT) and not path.startswith(ENVIRONMENT):
            os.write(2, f"read {path}\\n".encode())
            os._exit(99)
sys.addaudithook(_refuse_checkout)
"""
"""Ends a Python process that opens a file of the checkout; runs in each as `sitecustomize`."""


JOB = ("train.steps=20", "tracking=journal", "--json")


@pytest.fixture
def project(installed):
    """A project of one's own, whose processes end where they open a file of the checkout.

    The environment's own folder may lie in the checkout, and is not part of it.
    """
    site, environment = Path(installed.environ["PYTHONPATH"]), str(Path(sys.prefix).absolute())
    paths = f"CHECKOUT, ENVIRONMENT = {str(ROOT) + os.sep!r}, {environment + os.sep!r}\n"
    (site / "sitecustomize.py").write_text(paths + AUDIT)
    run(installed, "-m", "syncbn", "new", "mine")
    code = f"open({str(ROOT / 'README.md')!r})"
    assert installed.run(sys.executable, "-c", code).returncode == 99  # the hook looks
    return Bench(installed.folder / "mine", environ=installed.environ)


def test_a_project_of_ones_own_trains_without_a_file_of_the_checkout(project):
    assert json.loads(run(project, "-m", "syncbn", "train", *JOB))["steps"] == 20


@pytest.mark.slow
def test_its_ranks_do_from_torchrun_as_from_our_own_launcher(project):
    ours = run(project, "-m", "syncbn", "train", "launcher.num_workers=2", *JOB)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    theirs = run(project, *torchrun, "-m", "syncbn", "train", "name=torchrun", *JOB)
    assert json.loads(ours)["final"] == json.loads(theirs)["final"]


def _events(journal, event):
    records = map(json.loads, journal.read_text().splitlines())
    return [record for record in records if record.get("event") == event]
