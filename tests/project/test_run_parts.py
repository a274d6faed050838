"""What `make test` runs: no part is kept from running by another, and one line counts the tests of all."""

import sys

import pytest
from run_parts import PYTEST, Counts, Part, counts_of, parts_of, run

MIXED = """
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("no reason")

@pytest.fixture
def broken(): raise OSError

def test_has_no_fixture(broken): pass

@pytest.fixture
def broken_after():
    yield
    raise OSError

def test_passes_and_fails_to_clean_up(broken_after): pass
"""
GOOD = "def test_one(): pass\ndef test_two(): pass\n"


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A part whose tests are those of `source`, in a pytest without plugins, which take seconds to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def part(name, source):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"test_{name}.py").write_text(source)
        options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "-c", "/dev/null")
        return Part(name, (*PYTEST, *options, str(folder)))

    return part


def command(name, code):
    return Part(name, (sys.executable, "-c", code), is_pytest=False)


def test_a_failing_part_keeps_no_other_from_running_and_the_last_line_counts_all(part, capfd):
    lists = [[part("mixed", MIXED), command("gate", "print('the gate ran')")], [part("good", GOOD)]]
    assert run(lists) == 1
    said = capfd.readouterr().out.splitlines()
    assert "the gate ran" in said
    assert said[-2:] == ["failed: mixed (exit status 1)", "3 passed, 3 failed, 1 skipped"]


def test_lists_run_beside_each_other_and_show_their_output_in_order(part, tmp_path, capfd):
    came = tmp_path / "came"
    waits = command(
        "waits",
        f"""
import pathlib, time
while not pathlib.Path({str(came)!r}).exists(): time.sleep(0.01)
print("the first waited for the second")
""",
    )
    comes = command("comes", f"print('the second came'); open({str(came)!r}, 'w')")
    assert run([[waits], [comes, part("good", GOOD)]]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[:2] == ["the first waited for the second", "the second came"]


def test_a_closed_gate_fails_the_run_though_every_test_passes(part, capfd):
    assert run([[command("gate", "raise SystemExit(2)"), part("good", GOOD)]]) == 1
    said = capfd.readouterr().out.splitlines()
    assert said[-2:] == ["failed: gate (exit status 2)", "2 passed, 0 failed, 0 skipped"]


def test_a_run_without_failures_ends_with_status_0(part, capfd):
    assert run([[part("good", GOOD), command("gate", "")]]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"


def test_a_module_that_cannot_be_imported_counts_as_a_failure(part, capfd):
    assert run([[part("broken", "import no_such_module")]]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 skipped"


def test_pytest_that_dies_before_it_reports_counts_as_a_failure(tmp_path):
    assert counts_of(tmp_path / "none.xml", -9) == Counts(0, 1, 0)


def test_the_parts_of_make_test_are_disjoint_and_take_all_options():
    (layer, gate), (others,) = parts_of(["--numprocesses", "2"])
    assert "not gpu and not slow and layer" in layer.command
    assert "not gpu and not slow and not layer" in others.command
    assert "--cov" in layer.command
    assert "--fail-under" in gate.command
    assert all("--numprocesses" in part.command for part in (layer, others))
