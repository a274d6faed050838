"""Range checks: what cannot be meant is refused before anything is loaded, with key, value and what is allowed."""

import math
from dataclasses import replace

import pytest

from syncbn.checks import check
from syncbn.config import (
    Config,
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    ProbeConfig,
    StudyConfig,
    TrackingConfig,
    TrainConfig,
)
from syncbn.errors import UsageError

REFUSED = {
    "runs_dir=''": Config(runs_dir=""),
    "data.root=' '": Config(data=DataConfig(root=" ")),
    "seed=4294967296": Config(seed=2**32),
    "train.per_rank_batch=2147483648": Config(train=TrainConfig(per_rank_batch=2**31)),
    "tracking.uri='http://h:abc'": Config(tracking=TrackingConfig(uri="http://h:abc")),
    "tracking.uri='http://h:65536'": Config(tracking=TrackingConfig(uri="http://h:65536")),
    "tracking.uri='h:5000'": Config(tracking=TrackingConfig(uri="h:5000")),
    "model.dropout=1.0": Config(model=ModelConfig(dropout=1.0)),
    "model.dropout=-0.1": Config(model=ModelConfig(dropout=-0.1)),
    "model.dropout=nan": Config(model=ModelConfig(dropout=float("nan"))),
    "train.shares='by_size'": Config(train=TrainConfig(shares="by_size")),
    "launcher.processes=0": Config(launcher=LauncherConfig(processes=0)),
    "probe.names=['shift', 'shfit']": Config(probe=ProbeConfig(names=["shift", "shfit"])),
    "train.checkpoint_every_s=-1.0": Config(train=TrainConfig(checkpoint_every_s=-1.0)),
    "train.checkpoint_every_s=nan": Config(train=TrainConfig(checkpoint_every_s=math.nan)),
    "probe.every=-1": Config(probe=ProbeConfig(every=-1)),
    "probe.first=-1": Config(probe=ProbeConfig(first=-1)),
    "probe.samples=0": Config(probe=ProbeConfig(samples=0)),
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_value_out_of_range_is_named_with_what_is_allowed(named):
    with pytest.raises(UsageError) as error:
        check(REFUSED[named])
    assert str(error.value).startswith(f"{named} is not allowed: ")


def test_everything_in_range_passes():
    check(
        Config(
            model=ModelConfig(name="cnn", dropout=0.5, lrn=True),
            train=TrainConfig(shares="by_class", virtual=True),
            launcher=LauncherConfig(processes=2, num_workers=4),
            probe=ProbeConfig(names=["shift", "leak"], every=10, first=5, samples=100),
        )
    )


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (ModelConfig(lrn=True), r"model\.lrn=True .*model\.name=mlp: one of cnn, vgg"),
        (ModelConfig(name="torchvision", arch="resnet18", lrn=True), r"model\.lrn=True"),
        (ModelConfig(name="torchvision", arch="resnet18", dropout=0.5), r"model\.dropout=0\.5"),
    ],
)
def test_an_option_that_the_model_would_leave_aside_is_refused(model, named):
    with pytest.raises(UsageError, match=named):
        check(Config(model=model))


def test_options_that_need_real_ranks_are_refused_for_virtual_ones():
    cfg = Config(norm=NormConfig(name="torch_sync"), launcher=LauncherConfig(num_workers=2))
    check(cfg)
    with pytest.raises(UsageError, match=r"norm=torch_sync .* train\.virtual=True.*norm=sync"):
        check(replace(cfg, train=TrainConfig(virtual=True)))


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (Config(tracking=TrackingConfig(name="journal")), "tracking=journal: models go to MLflow"),
        (Config(study=StudyConfig()), "in a study, whose trials log no model"),
        (Config(tracking=TrackingConfig(model_name="a/b")), r"tracking\.model_name='a/b' is not"),
        (Config(tracking=TrackingConfig(experiment="a:b")), r"tracking\.experiment='a:b' is not"),
        (Config(tracking=TrackingConfig(model_name=" ")), r"tracking\.model_name=' ' is not"),
    ],
)
def test_a_network_that_could_not_be_logged_is_refused_before_it_is_trained(cfg, named):
    logged = replace(cfg, tracking=replace(cfg.tracking, log_model=True))
    with pytest.raises(UsageError, match=named):
        check(logged)
