"""Several studies in one go: each in a process of its own, whose end the others survive, and signals for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
from programs import ROOT, SYNCBN, Bench, complaint, wait_until

from syncbn.compare.suite.tiers import Launch
from syncbn.launch import studies as running
from syncbn.launch.studies import Job, run_all


def job(name, script, folder, **more):
    """A study whose process runs `script`."""
    launch = Launch(name, name, "?", (), 1, 0.0)
    plan = SimpleNamespace(config=SimpleNamespace(folder=folder / name))
    (folder / name).mkdir(exist_ok=True)
    return Job(launch, ("-c", script), plan, **more)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs {name: script} and returns the signal that stopped it, and the outcomes by name."""
    monkeypatch.setattr(running, "COMPARE", (sys.executable,))

    def run(scripts):
        outcomes = {}
        jobs = [job(name, script, tmp_path) for name, script in scripts.items()]
        stopped = run_all(jobs, lambda job: None, lambda o: outcomes.update({o.job.launch.name: o}))
        return stopped, outcomes

    return run


def test_one_that_fails_is_noted_and_the_rest_go_on(run, tmp_path):
    log = tmp_path / "a" / "error.log"
    says = (
        f"open({str(log)!r}, 'w').write('Traceback\\nDataError: no data\\n'); raise SystemExit(3)"
    )
    stopped, outcomes = run({"a": says, "b": "", "c": "import os; os.kill(os.getpid(), 9)"})
    assert stopped == 0
    assert [outcomes[name].code for name in "abc"] == [3, 0, 75]
    assert outcomes["a"].note == "DataError: no data"
    assert outcomes["b"].note == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_study_that_runs_and_ends_them_all(run, number):
    """The study asks for the signal, which comes back to it by way of the process that started it."""
    script = (
        "import os, signal, sys, time;"
        f"signal.signal({int(number)}, lambda n, _: os._exit(128 + n));"
        f"os.kill(os.getppid(), {int(number)}); time.sleep(60)"
    )
    before = signal.getsignal(number)
    stopped, outcomes = run({"a": script, "b": ""})
    assert stopped == number
    assert {name: o.code for name, o in outcomes.items()} == {"a": 128 + number}
    assert signal.getsignal(number) is before


def test_a_study_that_was_stopped_by_somebody_else_stops_the_rest_too(run):
    stopped, outcomes = run({"a": "raise SystemExit(143)", "b": ""})
    assert (stopped, list(outcomes)) == (15, ["a"])


def test_a_study_hears_when_the_process_that_started_it_is_killed(tmp_path):
    mark, up = tmp_path / "heard", tmp_path / "up"
    child = (
        "import os, signal, sys, time, pathlib;"
        f"signal.signal(15, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(143)));"
        f"up = pathlib.Path({str(up)!r}); up.with_name('new').write_text(str(os.getpid()));"
        "up.with_name('new').rename(up); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys, time, pathlib\n"
        "from syncbn.launch.studies import _stop_with_parent\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=_stop_with_parent, start_new_session=True)\n"
        f"while not pathlib.Path({str(up)!r}).exists(): time.sleep(0.02)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", parent], check=False)
    try:
        wait_until(mark.exists, 120)
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(up.read_text()), signal.SIGKILL)


def test_a_refused_study_is_one_with_bad_settings(tmp_path):
    outcomes = []
    bad = Job(Launch("a", "a", "?", (), 1, 0.0), (), None, refused="lr=abc is not allowed")
    assert run_all([bad], lambda job: None, outcomes.append) == 0
    assert (outcomes[0].code, outcomes[0].note) == (2, "lr=abc is not allowed")


@pytest.fixture
def bench(tmp_path):
    """A place with a conf/ of its own, whose only studies are two that take a moment and one that lacks its data."""
    bench = Bench(tmp_path / "place", environ={"SYNCBN_CONF": str(tmp_path / "conf")})
    bench.folder.mkdir()
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for path in (tmp_path / "conf" / "study").iterdir():
        path.unlink()
    demo = (ROOT / "conf" / "study" / "demo.yaml").read_text()
    tiers = "study:\n  tiers: [fast, full]\n  fast: ['study.seeds=[0,1,2]', train.steps=3]\n"
    for order, name in enumerate(("first", "second", "third")):
        text = demo.replace("name: demo", f"name: {name}")
        text = text.replace("study:\n", f"{tiers}  order: {order}\n", 1)
        if name == "first":
            text = text.replace("data: digits", "data: mnist")
        (tmp_path / "conf" / "study" / f"{name}.yaml").write_text(text)
    yield bench
    bench.kill_all()


SHORT = (
    "tracking=journal",
    "launcher.num_workers=1",
    "launcher.processes=1",
    "train.eval_every=0",
    "data.root=nowhere",
)


def test_a_study_that_fails_leaves_its_exit_code_and_a_line_in_the_ledger(bench):
    result = bench.call("studies", "first", *SHORT)
    assert result.returncode == 3, result.stderr
    assert "first (data)" in result.stderr.splitlines()[-1]
    book = json.loads((bench.folder / "runs" / "studies.json").read_text())["studies"]
    assert [(entry["study"], entry["code"]) for entry in book] == [("first", 3)]
    assert "0 of 1 studies done" in result.stdout


@pytest.mark.slow
def test_a_tier_runs_whole_though_one_study_lacks_its_data_and_goes_on_where_it_was(bench):
    fast = bench.run(*SYNCBN, "studies", "--tier", "fast", "third", "first", *SHORT)
    assert fast.returncode == 3, fast.stderr
    assert "1 of 2 studies failed: first-fast (data)" in fast.stderr.splitlines()[-1]
    assert "1 of 2 studies done; claims: " in fast.stdout
    runs = bench.folder / "runs"
    book = json.loads((runs / "studies.json").read_text())["studies"]
    assert [(entry["study"], entry["code"]) for entry in book] == [
        ("first-fast", 3),
        ("third-fast", 0),
    ]
    assert set(book[1]["verdicts"]) == {"sync_beats_local", "sync_equals_big_batch"}
    assert "| third-fast | done |" in (runs / "studies.md").read_text()

    trial = runs / "third-fast" / "trials" / "sync-0" / "journal.jsonl"
    written = trial.stat().st_mtime
    again = bench.run(*SYNCBN, "studies", "--tier", "fast", "third", *SHORT, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["studies"][0]["seconds"] == book[1]["seconds"]
    assert trial.stat().st_mtime == written

    page = bench.folder / "results.md"
    page.write_text((ROOT / "docs" / "results.md").read_text())
    shown = bench.run(*SYNCBN, "studies", "--show", "--tier", "fast", "--page", str(page))
    assert shown.returncode == 0, shown.stderr
    assert "### third-fast" in page.read_text()
    assert (bench.folder / "figures" / "result_third-fast.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--tier fast (minutes)"),
        (["nope"], "'nope' is not in conf/study/: first, second, third"),
        (["first", "name=x"], "each study keeps its own"),
        (["first", "data.rooot=x"], "did you mean 'data.root'"),
        (["--show"], "no study is finished"),
    ],
)
def test_a_call_that_names_no_runnable_study_is_refused_before_anything_starts(
    bench, arguments, said
):
    result = bench.call("studies", *arguments)
    assert result.returncode == 2
    assert said in complaint(result)
    assert not list(bench.folder.iterdir())


def test_a_plan_of_a_tier_names_the_command_of_each_study_and_starts_nothing(bench):
    result = bench.call("studies", "--tier", "full", "--dry-run", "--json", "seed=3")
    commands = [plan["command"] for plan in json.loads(result.stdout)]
    assert commands == [f"syncbn compare study={n} seed=3" for n in ("first", "second", "third")]
    assert not list(bench.folder.iterdir())
