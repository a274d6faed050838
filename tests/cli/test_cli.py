"""The command line, as a user and as a shell meet it."""

import json
import subprocess
import sys

import pytest
import yaml
from programs import BIN, SYNCBN, TRAIN, Bench, complaint
from ranks import started_by_torchrun

from syncbn.cli import VERBS

TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "syncbn", "train")
TINY = ("debug=tiny",)


def test_a_dry_run_prints_the_plan_and_starts_nothing(bench):
    result = bench.run(*TRAIN, "--dry-run", "launcher.num_workers=2", "seed=5")
    plan = yaml.safe_load(result.stdout)
    assert result.returncode == 0
    assert plan["command"].startswith("torchrun --standalone --nproc-per-node 2 -m syncbn train")
    assert plan["resources"]["ranks"] == 2
    assert plan["config"]["seed"] == 5
    assert not list(bench.folder.iterdir())


def test_a_study_can_be_planned_as_json(bench):
    result = bench.call("compare", "study=demo", "--dry-run", "--json")
    assert len(json.loads(result.stdout)["trials"]) > 1


BAD_INPUT = ["optim.lr=abc", "optim.lr=nan", "train.per_rank_batch=0", "lr=1", "model=nope", "+x=1",
             "data._target_=os.system", "launcher.num_workers=-1", "--max-restarts", "name=../up"]  # fmt: skip


def test_bad_input_is_answered_before_torch_or_ray_is_imported(bench):
    program = (
        "import sys\nfrom syncbn.cli.launching import main\nfor word in sys.argv[1:]:\n"
        "    print(word, main('train', [word]), flush=True)\n"
        "    assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), word"
    )
    result = bench.run(sys.executable, "-c", program, *BAD_INPUT)
    assert result.stdout.splitlines() == [f"{word} 2" for word in BAD_INPUT], result.stderr
    assert len(result.stderr.splitlines()) == len(BAD_INPUT)
    assert not list(bench.folder.iterdir())


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-"])
def test_a_plan_that_nobody_can_read_is_no_error(bench, redirection):
    command = f"exec {' '.join(TRAIN)} --dry-run {redirection}"
    result = bench.run("/bin/sh", "-c", command, stdout=subprocess.DEVNULL)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_training_does_not_need_anybody_to_listen(bench):
    command = f"exec {' '.join([*TRAIN, *TINY])} >/dev/full 2>&-"
    assert bench.run("/bin/sh", "-c", command).returncode == 0
    assert (bench.folder / "runs" / "run" / "summary.json").is_file()


@pytest.mark.world_size(2)
def test_of_ranks_that_are_started_together_only_rank_0_speaks(world_size, tmp_path):
    bench = Bench(tmp_path)
    with started_by_torchrun() as environment:
        bench.environ |= environment
        result = bench.call("train", *TINY, "--json")
    assert result.returncode == 0, result.stderr
    if environment["RANK"] == "1":
        assert (result.stdout, result.stderr) == ("", "")
        return
    summary = json.loads(result.stdout)
    assert summary["world_size"] == world_size
    assert summary == json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())


@pytest.mark.slow
def test_under_torchrun_only_rank_0_speaks(bench):
    result = bench.run(*TORCHRUN, *TINY, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["world_size"] == 2
    assert summary == json.loads((bench.folder / "runs" / "run" / "summary.json").read_text())


def test_a_study_as_json_is_json_alone(bench):
    result = bench.call("compare", "study=demo", "study.seeds=[0,1]", *TINY, "train.eval_every=0",
                        "launcher.num_workers=1", "launcher.processes=1", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["study"] == "demo"


def test_under_torchrun_an_error_is_said_once(bench):
    result = bench.run(*TORCHRUN, "optim.lr=abc")
    assert result.returncode != 0
    assert "abc" in complaint(result)


def test_two_ranks_of_this_machine_fail_with_one_line_and_leave_nothing(bench):
    result = bench.run(*TRAIN, *TINY, "launcher.num_workers=2", "data=mnist", "data.root=nowhere")
    assert result.returncode == 3
    assert "nowhere" in complaint(result)
    assert not bench.left_running()


def test_every_verb_explains_itself_and_speaks_json(bench):
    listed = bench.run(*SYNCBN, "--help").stdout
    assert all(verb in listed for verb in VERBS)
    for verb in VERBS:
        result = bench.call(verb, "--help")
        assert result.returncode == 0
        assert "--json" in result.stdout, verb


def test_the_doctor_and_the_version_speak_json(bench):
    findings = json.loads(bench.call("doctor", "--json").stdout)
    assert {"torch", "gpu", "runs folder"} <= {finding["subject"] for finding in findings}
    assert "torch" in json.loads(bench.call("version", "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["launcher.num_workers=999"], 2),
        (["launcher.address=ray://head:10001"], 2),
        (["launcher.address=127.0.0.1:1"], 7),
        (["launcher.address=127.0.0.1:1", "token"], 6),
    ],
)
def test_ray_out_of_reach_is_said_before_anything_starts(bench, arguments, code):
    if arguments[-1] == "token":
        bench.environ["RAY_AUTH_TOKEN"] = arguments.pop()
    result = bench.call("train", *TINY, "launcher=ray", *arguments)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not list(bench.folder.iterdir())
