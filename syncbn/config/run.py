"""The schema of one training run: which network, on what, normalised how, for how long, where."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROBES = (
    "quantiles",
    "shift",
    "saturation",
    "gradients",
    "population",
    "smoothness",
    "leak",
    "exchange",
    "oracle",
)
ARMS = (
    "none",
    "local",
    "local_avg",
    "sync",
    "sync_group",
    "big_batch",
    "torch_sync",
    "group_norm",
    "ghost",
)


@dataclass
class ModelConfig:
    """Which network is trained. Fields that a model does not use are left at their defaults."""

    name: str = "mlp"
    """`mlp`, `cnn`, `vgg`, `torchvision`, `timm`, or a model of an extension."""
    hidden: list[int] = field(default_factory=lambda: [100, 100])
    """Widths of the MLP's hidden layers."""
    activation: str = "relu"
    """`relu`, `sigmoid`, `tanh` or `silu` (mlp, cnn, vgg)."""
    init: str = "default"
    """`default` (torch's own) or `normal`: weights from N(0, init_std^2), biases 0."""
    init_std: float = 0.05
    """Standard deviation of the weights with `model.init=normal`."""
    placement: str = "pre"
    """Where the norm stands in a hidden layer: `pre` or `post` the activation, or on the layer's `input`."""
    width: int = 32
    """Channels of the first convolution (cnn, vgg)."""
    dropout: float = 0.0
    """Probability with which each hidden activation is dropped in training (mlp, cnn, vgg)."""
    lrn: bool = False
    """Local response normalisation after each activation, as in AlexNet (cnn, vgg)."""
    arch: str | None = None
    """Classification model by name, e.g. `resnet18` (torchvision, timm)."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an extension's model takes by keyword."""
    weights: str | None = None
    """Weights to start from: a `.safetensors` file, a `.pt` or `.pth` file with a state_dict, the folder or name of a
    run (its best checkpoint where it keeps one, else its newest), one of torchvision's, such as
    `ResNet18_Weights.IMAGENET1K_V1`, or `pretrained` for timm's; none starts from random ones."""
    weights_match: str = "all"
    """What of `model.weights` must fit the model by name and shape: `all`, `backbone` (all but the output layer, which
    starts from random weights), or `any` (what fits is loaded)."""
    weights_sha256: str | None = None
    """The sha256 of what `model.weights` names, filled in when a run is planned; another content is refused. Of a run
    it is that of its checkpoint's manifest."""
    download: bool = False
    """Fetch published weights that are not on this machine."""


@dataclass
class DataConfig:
    """Which images, from where, and how they are prepared."""

    name: str = "digits"
    """`digits`, `mnist`, `fashion_mnist`, `cifar10`, `image_folder`, `synthetic`, or a data set of an extension."""
    root: str = "data"
    """Folder that holds the data set in torchvision's layout; `digits` and `synthetic` need none."""
    download: bool = False
    """Fetch a missing data set from its publisher."""
    binarize: bool = False
    """Pixels above one half become 1, the others 0, as in Ioffe & Szegedy's MNIST experiment."""
    augment: bool = False
    """Random crop and flip of training images, seeded by sample and epoch."""
    limit: int | None = None
    """Use only this many training samples."""
    validation: float = 0.0
    """Share of the training samples held out; with it, `test_error` is measured on them, not on the test set."""
    image_size: int = 32
    """Height and width in pixels (synthetic, image_folder)."""
    channels: int = 3
    """Image channels (synthetic)."""
    num_classes: int = 10
    """Classes (synthetic)."""
    num_samples: int = 1024
    """Training samples (synthetic)."""
    num_loaders: int = 0
    """Processes beside each rank that load and transform samples; they change no number. A data set in memory whose
    samples are neither augmented nor transformed needs none, and starts none."""
    pin_memory: bool | None = None
    """Copy batches to page-locked memory first, from where a GPU fetches them while it computes; `null` does so where
    ranks compute on GPUs."""
    transforms: dict[str, Any] = field(default_factory=dict)
    """Transforms of extensions, each with its options, applied in this order to every sample:
    `{jitter: {strength: 0.2}, blur: {}}`."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an extension's data set takes by keyword."""


@dataclass
class TaskConfig:
    """What is optimised and measured."""

    name: str = "classification"
    """`classification`, `regression`, or a task of an extension."""
    label_smoothing: float = 0.0
    """Share of a target that is spread over all classes in the training loss (classification)."""
    top: int = 1
    """Also measure how often the class is not among the `top` largest logits (classification)."""
    confusion: bool = False
    """Also measure the accuracy averaged over classes, and write the confusion matrix of the last evaluation to
    the run's `measures/confusion_matrix.json` (classification)."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an extension's task takes by keyword."""


@dataclass
class NormConfig:
    """One arm of a comparison: what stands where the model asks for batch norm."""

    name: str = "sync"
    """`none`, `local`, `local_avg`, `sync`, `sync_group`, `big_batch`, `torch_sync`, `group_norm` or `ghost`."""
    group_size: int | None = None
    """Consecutive ranks that share statistics (sync_group)."""
    num_groups: int = 32
    """Channel groups (group_norm); the largest divisor of the channels that is no larger is used."""
    ghost_size: int = 2
    """Samples that share statistics (ghost)."""
    momentum: float = 0.1
    """Weight of a batch in the running statistics, as in torch."""
    eps: float = 1e-5
    """Added to variances, as in torch."""


@dataclass
class ParameterGroup:
    """What differs for some parameters from the rest of `optim`."""

    lr_scale: float = 1.0
    """Times the learning rate; 0 leaves them as they are."""
    weight_decay: float | None = None
    """In place of `optim.weight_decay`, for norm parameters and biases too; none changes nothing."""


@dataclass
class OptimConfig:
    """The optimiser and its learning-rate schedule."""

    name: str = "sgd"
    """`sgd`, `adam`, `adamw`, or an optimiser of an extension."""
    lr: float = 0.05
    """Learning rate, before the schedule and `optim.lr_scaling`."""
    momentum: float = 0.9
    """Of sgd."""
    nesterov: bool = False
    """Nesterov's momentum (sgd)."""
    weight_decay: float = 0.0
    """Of weights; of norm parameters and biases only with `optim.decay_norm_and_bias`."""
    decay_norm_and_bias: bool = False
    """Apply weight decay to norm parameters and biases too."""
    schedule: str = "cosine"
    """`constant`, `cosine`, `step` or `exponential`, after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from lr / warmup_steps."""
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    """Shares of the budget at which `step` multiplies the rate by gamma."""
    gamma: float = 0.1
    """Factor of the schedules `step` and `exponential`."""
    decay_steps: int = 1000
    """`exponential` multiplies the rate by gamma every so many steps; fewer steps decay faster."""
    lr_scaling: str = "none"
    """`none`, `linear` or `sqrt` in global batch over base_batch (Goyal et al. 2017; Krizhevsky 2014)."""
    base_batch: int = 256
    """The global batch at which `optim.lr` is meant, for `optim.lr_scaling`."""
    clip_norm: float | None = None
    """Largest global gradient norm, applied to the reduced gradient."""
    groups: dict[str, ParameterGroup] = field(default_factory=dict)
    """What differs for parameters whose name fits a shell pattern, e.g. `{hidden.*: {lr_scale: 0.1}}`; the first
    pattern that fits counts, and one that fits no parameter is refused."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an extension's optimiser takes by keyword."""


@dataclass
class TrainConfig:
    """How long, how much at a time, and what is written down on the way."""

    steps: int = 600
    """Optimiser steps."""
    per_rank_batch: int = 32
    """Samples a rank and micro-batch; the global batch is this times launcher.num_workers and accumulate."""
    accumulate: int = 1
    """Micro-batches a step, whose gradients are added; batch-norm statistics are those of a micro-batch."""
    virtual: bool = False
    """One process stands for all `launcher.num_workers` ranks: each batch is split into as many groups, normalised as
    those ranks would, and the gradient is the mean that DistributedDataParallel gives (`syncbn.virtual`)."""
    shares: str = "shuffled"
    """How a global batch is dealt to ranks: `shuffled`, or `by_class`, which gives each rank samples of few classes."""
    drop_last: bool = True
    """Skip an epoch's last, smaller global batch; otherwise ranks share it unevenly, correctly weighted."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_batch: int = 512
    """Samples a rank that an evaluation takes at a time."""
    log_every: int = 1
    """Steps between records of the training loss."""
    agree_every: int = 10
    """Steps between the small collectives that reduce losses and agree on stopping and on non-finite values; several
    ranks know the result of one a step later."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 leaves it to `checkpoint_every_s`. The end of a run is always saved."""
    checkpoint_every_s: float | None = None
    """Seconds between checkpoints, by the clock of rank 0; 0 saves none by the clock. None saves none either where
    `checkpoint_every` is set, and otherwise as often as 1 % of the time allows, every 5 to 300 s."""
    resume: bool = True
    """Continue from the run's latest checkpoint where it has one."""
    time_limit_s: float | None = None
    """Longest time of one attempt; then it saves and ends with 75, and the same command continues. Not in a study."""
    patience: int | None = None
    """Stop after so many evaluations without a better test error."""
    target_error: float | None = None
    """Stop once the test error is at or below this fraction."""
    keep_best: bool | None = None
    """Keep the checkpoint that did best too, by what the task decides by, which `checkpoints/BEST` names; needs
    `eval_every`. null is true where `patience` or `target_error` is set, and false otherwise and in a study."""
    precision: str = "float32"
    """`float32`, `float64`, or `bf16` or `fp16`: float32 parameters and statistics, the rest under autocast."""
    parallel: str = "ddp"
    """`ddp`: each rank has the whole network; `fsdp`: a part of each parameter, its gradient and its optimiser state,
    gathered block by block when it is computed with."""
    channels_last: bool = False
    """Keep images and convolutions in the memory format channels_last."""
    compile: bool = False
    """Train through torch.compile; evaluation and probes run eagerly."""
    checkpoint_activations: bool = False
    """Compute the activations inside each part of the model's Sequential children again in the backward pass, which
    saves their memory (`syncbn.train.network`)."""
    ema: float | None = None
    """Decay of a moving average of the parameters, with which the network is evaluated; none is off."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    num_threads: int = 1
    """CPU threads a rank; fixed, because it is part of what makes two runs bit-identical."""
    progress: bool = True
    """Show a progress bar on rank 0 when stderr is a terminal."""

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint that did best is kept: as `keep_best` says, else where the best decides the end."""
        if self.keep_best is not None:
            return self.keep_best
        return self.patience is not None or self.target_error is not None

    @property
    def dtype_name(self) -> str:
        """The floating dtype of parameters and inputs: `float32` or `float64`."""
        return "float64" if self.precision == "float64" else "float32"


@dataclass
class LauncherConfig:
    """Where ranks come from."""

    name: str = "local"
    """`local` (this machine) or `ray` (a Ray cluster)."""
    num_workers: int = 1
    """Ranks."""
    address: str | None = None
    """Ray cluster to join, `host:port`; none starts a local one."""
    cpus_per_worker: int = 1
    """CPUs that Ray reserves for a rank."""
    gpus_per_worker: int = 0
    """GPUs that Ray reserves for a rank."""
    processes: int | None = None
    """Processes that share out the trials of a study which take one process each; none means one a core."""
    timeout_s: float = 60.0
    """Longest wait in one collective."""
    start_timeout_s: float = 300.0
    """Longest wait for all ranks to come up."""
    max_restarts: int = 3
    """How often within an hour the launch goes on by itself, from the newest checkpoint, when a rank, worker or node
    died (what would else end it with 75); 0 never."""


@dataclass
class ProbeConfig:
    """What is looked at in a network while it trains (`syncbn.probes`); nothing by default."""

    names: list[str] = field(default_factory=list)
    """Any of `quantiles`, `shift`, `saturation`, `gradients`, `population`, `smoothness`, `leak`, `exchange` and
    `oracle`."""
    every: int = 0
    """Steps between looks; 0 looks at the start and at the end only."""
    first: int = 0
    """The first step that counts for what a probe sums up over training."""
    samples: int = 2000
    """Test images that a probe looks at, the first ones."""


@dataclass
class TrackingConfig:
    """Where numbers go besides the run's own journal."""

    name: str = "mlflow"
    """`mlflow` or `journal` (the journal alone)."""
    uri: str | None = None
    """MLflow tracking URI; none means the sqlite store in runs_dir."""
    experiment: str | None = None
    """MLflow experiment; none means the study's name, or `runs`."""
    log_model: bool = False
    """At the end of a run, log its network to MLflow as a graph that needs nothing of this package, and register it."""
    model_name: str | None = None
    """The registered model that `tracking.log_model` adds a version to; none means the experiment's name."""

    @property
    def registered_name(self) -> str:
        """The registered model of a single run."""
        return self.model_name or self.experiment or "runs"


@dataclass
class RunConfig:
    """One training run: everything that decides its numbers, and where they go."""

    name: str = "run"
    """The run's folder under runs_dir: one plain folder name."""
    seed: int = 0
    """Decides everything random: weights, order of samples, augmentation, dropout."""
    runs_dir: str = "runs"
    """Folder of all runs; the default MLflow store is in it too."""
    extensions: list[str] = field(default_factory=list)
    """Modules to import in every process, which register models, data sets, transforms, tasks and optimisers of one's
    own."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Callbacks of extensions by name, each with its options, called in this order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def folder(self) -> Path:
        """Where this run's files go."""
        return Path(self.runs_dir) / self.name

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks."""
        return self.micro_batch * self.train.accumulate

    @property
    def micro_batch(self) -> int:
        """Samples over all ranks that are normalised together at most: those of one forward pass."""
        return self.train.per_rank_batch * self.launcher.num_workers

    @property
    def num_ranks(self) -> int:
        """Processes that train: one for virtual ranks, and for `big_batch`, which takes the whole global batch."""
        alone = self.train.virtual or self.norm.name == "big_batch"
        return 1 if alone else self.launcher.num_workers
