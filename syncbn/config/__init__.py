"""The schema of runs and studies, as plain typed dataclasses.

A Hydra config is composed once (`syncbn.compose`), becomes a `Config` here, and from there on only these objects
travel; nothing changes them. Nothing in the project instantiates a class that a config names; names are looked up in
the registries of the module that owns them.
"""

from syncbn.config.identity import (
    config_hash,
    differences,
    flat,
    identity,
    identity_of,
    resume_hash,
    resume_hash_of,
    resume_identity_of,
)
from syncbn.config.run import (
    ARMS,
    PROBES,
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    OptimConfig,
    ParameterGroup,
    ProbeConfig,
    RunConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from syncbn.config.study import (
    KINDS,
    SCALES,
    ClaimConfig,
    Config,
    PublishedConfig,
    StudyConfig,
    TargetConfig,
    TuneConfig,
)

__all__ = [
    "ARMS",
    "KINDS",
    "PROBES",
    "SCALES",
    "ClaimConfig",
    "Config",
    "DataConfig",
    "LauncherConfig",
    "ModelConfig",
    "NormConfig",
    "OptimConfig",
    "ParameterGroup",
    "ProbeConfig",
    "PublishedConfig",
    "RunConfig",
    "StudyConfig",
    "TargetConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "TuneConfig",
    "config_hash",
    "differences",
    "flat",
    "identity",
    "identity_of",
    "resume_hash",
    "resume_hash_of",
    "resume_identity_of",
]
