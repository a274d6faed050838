"""What a launch says it would do, and what it refuses before doing it."""

import json

import pytest
import yaml
from programs import torchrun

from syncbn.cli.launching import make_plan
from syncbn.errors import UsageError
from syncbn.launch.plan import as_yaml, has_secrets

TORCHRUN = torchrun(rank="1")


def plan_of(verb, *overrides, environ=None):
    return make_plan(verb, overrides, environ or {})


def test_one_rank_needs_no_torchrun():
    assert plan_of("train", "norm=local").command == "syncbn train norm=local"


def test_several_ranks_of_this_machine_are_torchruns():
    plan = plan_of("train", "launcher.num_workers=3")
    assert plan.command.startswith("torchrun --standalone --nproc-per-node 3 -m syncbn train ")
    assert plan.resources["ranks"] == 3


def test_ray_starts_its_own_ranks():
    plan = plan_of("train", "launcher=ray", "launcher.num_workers=4", "launcher.gpus_per_worker=1")
    assert plan.command.startswith("syncbn train ")
    assert (plan.resources["ranks"], plan.resources["gpus"]) == (4, 4)


def test_big_batch_is_one_process():
    plan = plan_of("train", "norm=big_batch", "launcher.num_workers=4")
    assert (plan.num_ranks, plan.config.global_batch) == (1, 128)


def test_a_study_keeps_all_ranks_whatever_its_base_arm():
    plan = plan_of("compare", "study=demo", "norm=big_batch", "launcher.num_workers=2")
    assert plan.num_ranks == 2


def test_the_command_is_quoted_for_a_shell():
    plan = plan_of("compare", "study=demo", "study.seeds=[0, 1]")
    assert plan.command == "syncbn compare study=demo 'study.seeds=[0, 1]'"
    assert "none-0" in plan.trials
    assert len(plan.trials) == 2 * len(plan.config.study.arms)


def test_a_plan_is_yaml_and_json():
    plan = plan_of("train", "seed=7").to_dict()
    assert yaml.safe_load(as_yaml(plan)) == json.loads(json.dumps(plan)) == plan
    assert plan["config"]["seed"] == 7


def test_passwords_stay_out_of_a_plan():
    plan = plan_of("train", "tracking.uri=http://login0:sesame@host:5000")
    assert "sesame" not in as_yaml(plan.to_dict())
    assert has_secrets(plan.overrides)
    assert not has_secrets(["tracking.uri=http://host:5000", "data=mnist"])


def test_torchruns_world_size_takes_the_place_of_num_workers():
    plan = plan_of("train", environ=TORCHRUN)
    assert plan.config.launcher.num_workers == 2
    assert plan_of("train", "launcher.num_workers=2", environ=TORCHRUN).num_ranks == 2


def test_tasks_of_slurm_with_torchruns_variables_are_ranks():
    environ = torchrun(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID="0")
    assert plan_of("train", environ=environ).num_ranks == 2


def test_a_batch_script_of_slurm_starts_its_own_ranks():
    two = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    one = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}
    for environ in (two, one):
        assert plan_of("train", "launcher.num_workers=3", environ=environ).num_ranks == 3


MLFLOW = {"MLFLOW_TRACKING_URI": "http://host:5000", "MLFLOW_EXPERIMENT_NAME": "mine"}


@pytest.mark.parametrize(
    ("verb", "overrides"),
    [("train", ()), ("compare", ("study=demo",)), ("sweep", ("seed=0,1",))],
)
def test_mlflows_variables_are_used_and_shown(verb, overrides):
    plan = plan_of(verb, *overrides, environ=MLFLOW)
    assert plan.to_dict()["config"]["tracking"] == {
        **plan_of(verb, *overrides).to_dict()["config"]["tracking"],
        "uri": "http://host:5000",
        "experiment": "mine",
    }
    for trial in plan.sweep.trials if plan.sweep else ():
        assert trial.config.tracking.uri == "http://host:5000"


def test_settings_come_before_mlflows_variables():
    own = ("tracking.uri=sqlite:///x", "tracking.experiment=other")
    tracking = plan_of("train", *own, environ=MLFLOW).config.tracking
    assert (tracking.uri, tracking.experiment) == ("sqlite:///x", "other")
    plan_of("train", "tracking=journal", environ={"MLFLOW_RUN_ID": "abc"})


def test_checks_across_keys_see_torchruns_world_size():
    with pytest.raises(UsageError, match=r"group_size=4 must divide launcher.num_workers=2"):
        plan_of("train", "norm=sync_group", "norm.group_size=4", environ=TORCHRUN)


@pytest.mark.parametrize("norm", ["local", "local_avg", "sync_group"])
def test_samples_that_would_be_normalised_alone_are_refused(norm):
    alone = (
        f"norm={norm}",
        "train.per_rank_batch=1",
        "launcher.num_workers=2",
        "norm.group_size=1",
    )
    with pytest.raises(UsageError, match="at least 2 samples must share"):
        plan_of("train", *alone)
    for enough in ("norm=sync", "norm=big_batch", "norm=none", "model=cnn"):
        plan_of("train", *alone, enough)


@pytest.mark.parametrize(
    ("verb", "overrides", "environ", "complaint"),
    [
        ("train", (), torchrun("2", "2"), "RANK=2 is not allowed"),
        ("train", (), torchrun("2", "-1"), "RANK=-1 is not allowed"),
        ("train", (), torchrun("0", "0"), "WORLD_SIZE=0 is not allowed"),
        ("train", (), torchrun("two", "0"), "WORLD_SIZE=two is not allowed"),
        ("train", (), torchrun(MASTER_PORT="65536"), "MASTER_PORT=65536 is not allowed: .* from 1"),
        ("train", (), torchrun(LOCAL_RANK="x"), "LOCAL_RANK=x is not allowed"),
        ("train", (), {"WORLD_SIZE": "1"}, "set without RANK, MASTER_ADDR, MASTER_PORT"),
        ("train", (), {"RANK": "1"}, "RANK=1 is set without WORLD_SIZE"),
        ("train", ("launcher.num_workers=8",), TORCHRUN, "num_workers=8 and WORLD_SIZE=2"),
        ("train", (), {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
         "srun started 2 tasks .*torchrun --nnodes"),
        ("train", (), {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun started 2 tasks"),
        ("train", (), {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4"),
        ("compare", ("study=demo",), {"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpiexec started 2"),
        ("train", (), {"MLFLOW_RUN_ID": "abc"}, "MLFLOW_RUN_ID=abc is not allowed: .*unset it"),
        ("train", (), {"MLFLOW_EXPERIMENT_ID": "3"}, "MLFLOW_EXPERIMENT_NAME; unset it"),
        ("train", (), {"MLFLOW_TRACKING_URI": "file:///x"}, "MLFLOW_TRACKING_URI='file:///x' is not"),
        ("train", ("norm=big_batch",), TORCHRUN, "norm=big_batch is one process"),
        ("train", ("launcher=ray",), TORCHRUN, "launcher=ray starts its own ranks"),
        ("compare", ("study=demo",), TORCHRUN, "compare starts its own ranks"),
        ("compare", (), {}, "compare needs study=NAME; studies: .*demo"),
        ("train", ("study=demo",), {}, "give it to compare"),
        ("compare", ("study=demo", "+study.arms.bad=['norm=nope']"), {}, "nope"),
        ("train", ("launcher.num_workers=0",), {}, "launcher.num_workers=0 is not allowed"),
        ("compare", ("study=demo", "+study.arms.wide=['norm=sync','model.hidden=[7]']"), {},
         r"'none' and 'wide' differ in model.hidden \(\[100, 100\] against \[7\]\)"),
        ("compare", ("study=demo", "+study.arms.four=['norm=sync','launcher.num_workers=4']"), {},
         r"'none' and 'four' differ in launcher.num_workers \(2 against 4\)"),
        ("compare", ("study=demo", "study.claims=[{name:c,arm:sync,against:local,metric:top5}]"), {},
         "metric='top5' is not measured: one of train_loss"),
        ("compare", ("study=demo", "train.time_limit_s=9"), {}, "time_limit_s=9 is not allowed in"),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_start_is_refused(verb, overrides, environ, complaint):
    with pytest.raises(UsageError, match=complaint):
        plan_of(verb, *overrides, environ=environ)
