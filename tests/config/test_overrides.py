"""Several values for a key make a grid; what cannot be one is said in one line, before anything starts."""

import pytest

from syncbn.compare.sweep.design import Sweep, sweep_of, trial_name
from syncbn.compose import compose, compose_grid, vary
from syncbn.config import config_hash
from syncbn.errors import UsageError
from syncbn.registry import CALLBACKS, TRANSFORMS


def points(*overrides):
    return [
        {key: value.plain for key, value in point.items()}
        for point, _ in compose_grid(overrides)[1]
    ]


def test_every_combination_is_a_point_and_the_last_key_changes_fastest():
    assert points("optim.lr=0.1,0.2", "seed=range(0,2)", "train.steps=3") == [
        {"optim.lr": 0.1, "seed": 0},
        {"optim.lr": 0.1, "seed": 1},
        {"optim.lr": 0.2, "seed": 0},
        {"optim.lr": 0.2, "seed": 1},
    ]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("optim.lr=choice(0.1,0.2)", [0.1, 0.2]),
        ("optim.lr=range(0.1,0.31,0.1)", [0.1, 0.2, 0.3]),
        ("seed=range(6,0,-3)", [6, 3]),
        ("model.hidden=[8],[8,8]", [[8], [8, 8]]),
        ("train.ema=null,0.9", [None, 0.9]),
        ("optim.nesterov=true,false", [True, False]),
        ("norm=glob(sync*)", ["sync", "sync_group"]),
        ("norm=glob(*,exclude=[s*,l*,t*,g*])", ["big_batch", "none"]),
        ("seed=sort(3,1,2)", [1, 2, 3]),
        ("model.activation='relu',\"tanh\"", ["relu", "tanh"]),
    ],
)
def test_values_are_given_in_hydras_grammar(override, values):
    key = override.partition("=")[0]
    found = [point[key] for point in points(override, "norm.group_size=1")]
    assert found == (pytest.approx(values) if isinstance(values[0], float) else values)


def test_a_point_is_what_its_settings_alone_compose_to():
    """Keys are set in a copy of what Hydra composed once, which must not show."""
    fixed = ("optim.momentum=0.5", "train.eval_batch=7")
    swept = ("optim=sgd,adam", "optim.groups={a.*:{lr_scale:0.1}},{b.*:{lr_scale:0.2}}")
    for point, cfg in compose_grid([*fixed, *swept])[1]:
        alone = compose([*fixed, *(f"{key}={value.text}" for key, value in point.items())])
        assert cfg == alone


def test_options_of_transforms_and_callbacks_are_swept_as_any_key(monkeypatch):
    for key, registry, build in (
        ("data.transforms", TRANSFORMS, _dim),
        ("callbacks", CALLBACKS, _watch),
    ):
        monkeypatch.setattr(registry, "_entries", {})
        registry.register("own")(build)
        for point, cfg in compose_grid([f"{key}.own.by=1.0,2.0"])[1]:
            assert cfg == compose([f"{key}.own.by={point[f'{key}.own.by'].text}"])


def _dim(input, *, by: float = 0.5):
    return input * by


def _watch(*, by: float = 0.5):
    return by


def test_quoted_commas_and_lists_are_one_value():
    grid, _ = compose_grid(["seed=1,2", "model.hidden=[8,8]", "tracking.experiment='a,b'"])
    assert list(grid.axes) == ["seed"]
    assert grid.fixed == ("model.hidden=[8,8]", "tracking.experiment='a,b'")


BAD_GRIDS = {
    "optim.lr=0.1,abc": "trial optim.lr=abc: optim.lr=abc is not allowed: Value 'abc'",
    "optim.lr=0.1,-1": "trial optim.lr=-1: optim.lr=-1.0 is not allowed: a finite number > 0",
    "optim.lrr=0.1,0.2": "did you mean 'optim.lr'",
    "model=mlp,nope": "trial model=nope",
    "model=mlp,torchvision": "trial model=torchvision: model=torchvision needs model.arch",
    "optim.lr=0.1": "a sweep of one trial",
    "seed=choice(1)": "a sweep of one trial",
    "seed=range(3,3)": "'seed=range(3,3)' has no value",
    "seed=range(0,3,0)": "has no value",
    "seed=choice()": "empty choice",
    "norm=glob(x*)": "'norm=glob(x*)' fits no option of the group norm: one of big_batch",
    "seed=glob(*)": "glob() chooses among the options of a group",
    "seed=range(0,10000000000)": "more than 1000 values",
    "seed=shuffle(range(0,10000000000))": "more than 1000 values",
    "seed=range(0,50) train.steps=range(1,50)": "50 of seed x 49 of train.steps make 2450 trials",
    "optim.lr=0.1,0.10": "trials optim.lr=0.1 and optim.lr=0.1 are the same",
    "seed=1,2 seed=3": "seed is given twice",
    "optim.lr=interval(0,1)": "has no end of values",
    "optim.lr=log(1,2)": "Unknown function 'log'",
    "optim.lr=(1,2": "cannot be read",
    "name=a,b": "all trials of a sweep have one name",
    "launcher=local,ray": "all trials of a sweep have one launcher",
    "launcher.address=a,b": "all trials of a sweep have one launcher.address",
    "task=regression,classification": "one task, by whose measure they are sorted",
    "study=demo,cost": "`syncbn studies`",
    "extensions=[a],[b]": "a list of module names",
    "seed=1,2 tracking.name=mlflow tracking.log_model=true": "in a sweep, whose trials log no model",
    "seed=1,${oc.env:PATH}": "only oc.env of HOME",
}


@pytest.mark.parametrize("settings", BAD_GRIDS)
def test_a_grid_that_cannot_be_run_is_refused_whole_and_says_why(settings):
    with pytest.raises(UsageError) as refused:
        sweep_of(settings.split())
    assert BAD_GRIDS[settings] in str(refused.value)
    assert "\n" not in str(refused.value)


BAD_FORMS = {
    "optim.lr=0.1,0.2": "`syncbn sweep` runs a trial for each",
    "seed=range(0,3)": "`syncbn sweep` runs a trial for each",
    "+optim.lr=0.1": "optim.lr is there already, and needs no +: give optim.lr=0.1",
    "++optim.lr=0.1": "needs no ++: give optim.lr=0.1",
    "+model=cnn": "give model=cnn",
    "+optim.lrr=0.1": "unknown key 'optim.lrr'; did you mean 'optim.lr'?",
    "~optim.lr": "no key of a run can be left out",
    "~model": "no key of a run can be left out",
    "optim/lr=0.1": "give optim.lr=0.1",
    "model@net=cnn": "give model=cnn",
    "=0.1": "give key=value",
    "optim.lr==0.1": "cannot be read",
    "optim.lr": "give key=value",
    "hydra.run.dir=x": "name= and runs_dir=",
    "hydra/launcher=joblib": "launcher=local and launcher=ray",
    "hydra.sweeper.n=3": "`syncbn sweep`",
    "+hydra.job.name=x": "name= names a run",
    "hydra/job_logging=none": "set by syncbn's own keys",
    "model=null": "one of cnn, mlp",
    "model=": "one of cnn, mlp",
    "model=5": "one of cnn, mlp",
    "norm=[sync]": "one of big_batch",
    "study=null": "or nothing at all",
    "model.name=resnet18": "give model=resnet18",
    "optim.groups=null": "optim.groups=null is not allowed: field",
    "optim.lr=": "optim.lr= is not allowed: Value ''",
}


@pytest.mark.parametrize("override", BAD_FORMS)
def test_a_form_that_is_no_setting_of_a_run_says_what_is(override):
    with pytest.raises(UsageError) as refused:
        compose([override])
    assert BAD_FORMS[override] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_trials_have_folders_of_their_own_whose_names_say_their_values():
    sweep: Sweep = sweep_of(["optim.lr=0.1,1e-5", "norm=none,local", "seed=3,4", "runs_dir=r"])
    assert sweep.config.name == "run-sweep"
    assert [trial.name for trial in sweep.trials[:3]] == [
        "lr_0.1-norm_none-3",
        "lr_0.1-norm_none-4",
        "lr_0.1-norm_local-3",
    ]
    assert len({trial.config.folder for trial in sweep.trials}) == 8
    assert sweep.trials[1].config.seed == 4
    assert sweep_of(["seed=1,2", "name=mine"]).config.name == "mine"


def test_a_trial_is_the_run_that_its_settings_name_alone():
    sweep = sweep_of(["optim.lr=0.1,0.2", "seed=5"])
    alone = compose(["optim.lr=0.2", "seed=5"])
    assert config_hash(sweep.trials[1].config) == config_hash(alone)


def test_names_of_trials_stay_short_and_apart():
    long = trial_name({"hidden": "[" + ",".join("1" * 60) + "]"})
    other = trial_name({"hidden": "[" + ",".join("1" * 61) + "]"})
    assert len(long) <= 80
    assert long != other
    assert trial_name({"a": "[1,1]"}) != trial_name({"a": "[1_1]"})
    assert trial_name({}) == "seed"


def test_the_home_folder_takes_the_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    cfg = compose(["runs_dir='~/runs'", "data.root=~", "tracking.uri='sqlite:///~/store.db'"])
    assert cfg.runs_dir == "/home/of/mine/runs"
    assert cfg.data.root == "/home/of/mine"
    assert cfg.tracking.uri == "sqlite:////home/of/mine/store.db"
    with pytest.raises(UsageError, match=r"model.weights=/home/of/mine/none\.pt is not"):
        compose(["model.weights=~/none.pt"])
    with pytest.raises(UsageError, match="names no user's home"):
        compose(["runs_dir='~nobody-of-that-name/x'"])
    varied = vary(cfg, ["data.root=~/other"])
    assert varied.data.root == "/home/of/mine/other"


@pytest.mark.parametrize("override", ["study.seeds=[1]", "study=demo"])
def test_an_arm_changes_nothing_of_its_study_and_keeps_the_checks_that_studies_have(override):
    cfg = compose(["study=demo"])
    with pytest.raises(UsageError, match=r"is not allowed: an arm changes a run, not its study"):
        vary(cfg, [override])
    with pytest.raises(UsageError, match=r"train.time_limit_s=9.* is not allowed in a study"):
        vary(cfg, ["train.time_limit_s=9"])
