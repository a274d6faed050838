"""Errors that synchronised batch norms have had, planted one at a time: the tests must see each of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS as OTHERS
from mutants import Mutant
from triton_mutants import TRITON

MUTANTS = [*OTHERS, *TRITON]
ROOT = Path(__file__).parents[2]
BUILD = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext", "--inplace"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_the_mutant_would_change_what_is_there(mutant):
    said = (ROOT / mutant.file).read_text().count(mutant.before)
    assert said == 1, f"{mutant.file} says {mutant.before!r} {said} times"


@pytest.mark.parametrize("test", sorted({mutant.test for mutant in MUTANTS}))
def test_a_test_that_must_see_a_mutant_exists(test):
    file, _, name = test.partition("::")
    assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_the_mutant_is_killed(mutant, tmp_path):
    shutil.copytree(ROOT / "syncbn", tmp_path / "syncbn")
    file = tmp_path / mutant.file
    file.write_text(file.read_text().replace(mutant.before, mutant.after))
    if file.suffix in (".cpp", ".h"):
        _build(tmp_path)
    result = _run([mutant], tmp_path)
    assert result.returncode == 1, f"survived: {result.stdout}"
    assert "1 failed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kernels", sorted({mutant.kernels for mutant in MUTANTS}))
def test_without_a_mutant_the_same_tests_pass(kernels, tmp_path):
    shutil.copytree(ROOT / "syncbn", tmp_path / "syncbn")
    result = _run([mutant for mutant in MUTANTS if mutant.kernels == kernels], tmp_path)
    assert result.returncode == 0, result.stdout


def _build(folder: Path) -> None:
    """Compile the native library of the copy of the package in `folder`."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    native = folder / "syncbn/norm/native"
    for built in native.glob("*.so"):
        built.unlink()
    subprocess.run(BUILD, cwd=folder, check=True, capture_output=True)
    assert list(native.glob("*.so")), "the mutant does not compile"


def _run(mutants: list[Mutant], package: Path) -> subprocess.CompletedProcess[str]:
    """Run the mutants' tests against the copy of the package in the folder `package`, which comes first on the path."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    tests = sorted({str(ROOT / mutant.test) for mutant in mutants})
    environment = os.environ | {"PYTHONPATH": str(package)}
    if mutants[0].kernels:
        environment["SYNCBN_KERNELS"] = mutants[0].kernels
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
