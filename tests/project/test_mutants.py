"""Errors planted in the package one at a time: the tests must see each of them."""

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
from mutants import MUTANTS
from mutants.building import Builder
from mutants.planting import ROOT, Edited, MissedAim, Mutant, Replaced, edited, plant, split
from own_ranks import run_ranks

STARTUP = ROOT / "tests/support/mutants/startup"
SETTINGS = sorted({(m.kernels, m.exchange) for m in MUTANTS if m.environment})
"""Those in which the suite itself does not run the tests of mutants."""
REPLACED = [mutant for mutant in MUTANTS if isinstance(mutant, Replaced)]
EDITED = [mutant for mutant in MUTANTS if isinstance(mutant, Edited)]


def _what(mutant: Mutant) -> str:
    return mutant.what


def test_no_two_mutants_are_called_the_same():
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", REPLACED, ids=_what)
def test_a_replacement_takes_the_place_of_something_and_its_arguments(mutant):
    module, name = split(mutant.aim)
    if "triton" in module:
        pytest.importorskip("triton")
    original = import_module(module)
    for part in name.split("."):
        assert part in vars(original), f"{mutant.aim} does not exist"
        original = vars(original)[part]
    if not inspect.isfunction(original):
        return
    ours, theirs = (inspect.signature(f).parameters for f in (mutant.by(original), original))
    kinds = {parameter.kind for parameter in ours.values()}
    assert list(ours) == list(theirs) or inspect.Parameter.VAR_KEYWORD in kinds


@pytest.mark.parametrize("mutant", EDITED, ids=_what)
def test_an_edited_fragment_stands_in_its_function_once(mutant):
    text = edited(mutant)
    assert text != (ROOT / mutant.file).read_text()
    if not mutant.is_native:
        compile(text, mutant.file, "exec")


def collect():
    tests = sorted({str(ROOT / mutant.test) for mutant in MUTANTS})
    os._exit(
        pytest.main(["--collect-only", "-q", "--assert=plain", "-p", "no:cacheprovider", *tests])
    )


def test_the_test_of_every_mutant_exists():
    [found] = run_ranks(__name__, "collect", world_size=1)
    assert found.returncode == 0, found.output


TOY = {
    "__init__": "",
    "inner": "def f(): return 1\nclass C:\n    def m(self): return f()\n    p = property(m)\n",
    "outer": "from toy.inner import C, f\n",
}


def test_a_replacement_reaches_those_that_import_the_name_itself(tmp_path, monkeypatch):
    _write_toy(tmp_path, monkeypatch)
    plant(Replaced("", "", aim="toy.inner.f", by=lambda original: lambda: original() + 1))
    outer = import_module("toy.outer")
    assert (outer.f(), outer.C().m(), outer.C().p) == (2, 2, 2)


@pytest.mark.parametrize("name", ["m", "p"])
def test_methods_and_properties_can_be_replaced(tmp_path, monkeypatch, name):
    _write_toy(tmp_path, monkeypatch)
    plant(Replaced("", "", aim=f"toy.inner.C.{name}", by=lambda original: lambda self: 7))
    found = getattr(import_module("toy.outer").C(), name)
    assert (found() if name == "m" else found) == 7


@pytest.mark.parametrize("name", ["g", "C.n", "D.m"])
def test_a_name_that_does_not_exist_is_a_missed_aim(tmp_path, monkeypatch, name):
    _write_toy(tmp_path, monkeypatch)
    plant(Replaced("", "", aim=f"toy.inner.{name}", by=lambda original: original))
    with pytest.raises(MissedAim, match=name):
        import_module("toy.outer")
    with pytest.raises(MissedAim, match="no module"):
        split("tay.inner.f")


def _write_toy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `toy` in `folder`, not imported before; what is planted goes with the test."""
    (folder / "toy").mkdir()
    for name, text in TOY.items():
        (folder / f"toy/{name}.py").write_text(text)
    monkeypatch.setattr("mutants.planting.ROOT", folder)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    monkeypatch.syspath_prepend(folder)
    for module in ("toy", "toy.inner", "toy.outer"):
        monkeypatch.delitem(sys.modules, module, raising=False)


SOURCES = {
    "a.py": "def f():\n    return 1\ndef g():\n    return 1\nclass C:\n    def f(self): return 2\n",
    "a.cpp": "int f(int a) { return h(a); }\nint f() { return f(1); }\nint g(int a) { if (f(a)) { return f(2); } }\n",
}


@pytest.mark.parametrize(
    ("file", "function", "before", "line"),
    [
        ("a.py", "f", "return 1", 1),
        ("a.py", "g", "return 1", 3),
        ("a.py", "C.f", "return 2", 5),
        ("a.cpp", "f", "h(a)", 0),
        ("a.cpp", "f", "f(1)", 1),
        ("a.cpp", "g", "f(2)", 2),
    ],
)
def test_a_fragment_is_edited_in_its_own_function(tmp_path, file, function, before, line):
    (tmp_path / file).write_text(SOURCES[file])
    mutant = Edited("", "", file=file, function=function, before=before, after="0")
    lines = zip(edited(mutant, tmp_path).splitlines(), SOURCES[file].splitlines(), strict=True)
    assert [number for number, (ours, theirs) in enumerate(lines) if ours != theirs] == [line]


@pytest.mark.parametrize(
    ("file", "function", "before"),
    [
        ("a.py", "f", "return 2"),
        ("a.py", "h", "return"),
        ("a.cpp", "f", "return"),
        ("a.cpp", "h", "a"),
    ],
)
def test_a_fragment_that_is_not_there_once_is_a_missed_aim(tmp_path, file, function, before):
    (tmp_path / file).write_text(SOURCES[file])
    with pytest.raises(MissedAim, match=f"{function} have"):
        edited(Edited("", "", file=file, function=function, before=before, after=""), tmp_path)


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Compiles what mutants of one session have in common once."""
    return Builder(tmp_path_factory.mktemp("objects"))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=_what)
def test_the_mutant_is_killed(mutant, tmp_path, builder):
    package = ROOT
    if isinstance(mutant, Edited):
        text, package = edited(mutant), tmp_path
        shutil.copytree(ROOT / "syncbn", tmp_path / "syncbn")
        (tmp_path / mutant.file).write_text(text)
        if mutant.is_native:
            shutil.copy(ROOT / "pyproject.toml", tmp_path)
            builder.build(tmp_path)
    result = _pytest([mutant], package, planted=mutant.what)
    assert result.returncode == 1, f"survived: {result.stdout}{result.stderr}"
    assert "1 failed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "exchange"), SETTINGS)
def test_without_a_mutant_the_same_tests_pass(kernels, exchange):
    same = [m for m in MUTANTS if (m.kernels, m.exchange) == (kernels, exchange)]
    result = _pytest(same, ROOT)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"


def _pytest(
    mutants: Sequence[Mutant], package: Path, planted: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the tests of `mutants`, in the environment of the first, on the package in the folder `package`."""
    options = ("-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    tests = sorted({str(ROOT / mutant.test) for mutant in mutants})
    environment = os.environ | mutants[0].environment | {"SYNCBN_MUTANT": planted}
    environment["PYTHONPATH"] = f"{STARTUP}{os.pathsep}{package}"
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
