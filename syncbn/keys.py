"""Keys of the schema, and which of them is meant by a word that is none.

Other programs have other words for the same: those that are often tried are listed with our key, and with how to
convert the value where its unit is another.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from syncbn.config import Config

_NEAR = 0.65
"""How alike two words must be for one to be taken for the other, as `difflib` measures it."""

SYNONYMS: Mapping[str, tuple[str, str]] = {
    "epochs num_epochs max_epochs n_epochs epoch": (
        "train.steps",
        "optimiser steps: epochs x training samples / (train.per_rank_batch x launcher.num_workers x train.accumulate)",
    ),
    "step max_steps num_steps n_steps total_steps train_steps iterations num_iterations iters max_iters": (
        "train.steps",
        "",
    ),
    "batch_size batch batchsize bs train_batch_size per_device_train_batch_size per_device_batch_size "
    "global_batch_size global_batch": (
        "train.per_rank_batch",
        "samples a rank: the global batch / (launcher.num_workers x train.accumulate)",
    ),
    "eval_batch_size val_batch_size test_batch_size": ("train.eval_batch", "samples a rank"),
    "learning_rate init_lr base_lr learningrate max_lr": ("optim.lr", ""),
    "wd decay l2": ("optim.weight_decay", ""),
    "optimizer optimiser opt": ("optim", "one of its options, as optim=adamw"),
    "scheduler lr_scheduler lr_schedule": ("optim.schedule", ""),
    "warmup warmup_epochs num_warmup_steps": ("optim.warmup_steps", "in optimiser steps"),
    "warmup_ratio": ("optim.warmup_steps", "in optimiser steps: the ratio x train.steps"),
    "clip grad_clip clip_grad clip_grad_norm max_grad_norm gradient_clip_val": (
        "optim.clip_norm",
        "",
    ),
    "workers": (
        "launcher.num_workers",
        "ranks; processes that load data are data.num_loaders",
    ),
    "data_workers loader_workers num_data_workers dataloader_workers dataloader_num_workers loaders": (
        "data.num_loaders",
        "processes beside each rank",
    ),
    "gpus num_gpus n_gpus ngpus gpu_ids devices nproc nproc_per_node num_processes world_size ranks num_ranks": (
        "launcher.num_workers",
        "the number of ranks, each of which takes a GPU where there are any",
    ),
    "accelerator cuda gpu use_gpu use_cuda": ("train.device", "auto, cpu or cuda"),
    "random_seed rng_seed manual_seed": ("seed", ""),
    "amp fp16 bf16 mixed_precision half dtype use_amp": (
        "train.precision",
        "float32, float64, bf16 or fp16",
    ),
    "grad_accum accumulation accumulation_steps accum_steps accumulate_grad_batches gradient_accumulation "
    "gradient_accumulation_steps": ("train.accumulate", ""),
    "network net architecture model_type": ("model", "one of its options, as model=cnn"),
    "pretrained init_from": (
        "model.weights",
        "a file, a run, or the name of published weights",
    ),
    "ckpt ckpt_path resume_from resume_from_checkpoint load_from checkpoint": (
        "train.resume",
        "the same command goes on from its checkpoint; another run's weights are model.weights=NAME",
    ),
    "dataset data_name dataset_name": ("data", "one of its options, as data=mnist"),
    "data_dir data_path data_root datadir dataset_path data_folder": ("data.root", ""),
    "output_dir out_dir output save_dir log_dir logdir exp_dir work_dir workdir output_path": (
        "runs_dir",
        "the folder of all runs; a run's own is runs_dir/name",
    ),
    "run_name exp_name": ("name", ""),
    "img_size imgsz input_size resolution crop_size": ("data.image_size", "pixels"),
    "n_classes classes": ("data.num_classes", ""),
    "val_split validation_split val_fraction val_ratio": ("data.validation", "a share from 0 to 1"),
    "augmentation augmentations aug": ("data.augment", "true or false"),
    "early_stopping early_stop early_stopping_patience": (
        "train.patience",
        "evaluations without a better test error; needs train.eval_every",
    ),
    "save_every save_steps save_freq save_interval checkpoint_interval save_strategy": (
        "train.checkpoint_every",
        "in optimiser steps; train.checkpoint_every_s is in seconds",
    ),
    "train_time_interval save_interval_s save_every_s checkpoint_interval_s save_every_seconds": (
        "train.checkpoint_every_s",
        "in seconds",
    ),
    "eval_steps eval_interval eval_freq val_every val_interval val_check_interval eval_strategy": (
        "train.eval_every",
        "in optimiser steps",
    ),
    "log_interval log_freq logging_steps log_every_n_steps print_freq": (
        "train.log_every",
        "in optimiser steps",
    ),
    "save_best best load_best_model_at_end": ("train.keep_best", "true or false"),
    "ema_decay": ("train.ema", "a number between 0 and 1"),
    "strategy ddp fsdp": ("train.parallel", "ddp or fsdp"),
    "gradient_checkpointing activation_checkpointing": (
        "train.checkpoint_activations",
        "true or false",
    ),
    "hidden_size hidden_dim hidden_sizes layers": ("model.hidden", "a list, as [100,100]"),
    "dropout_rate dropout_prob drop_rate": ("model.dropout", ""),
    "smoothing": ("task.label_smoothing", ""),
    "sync_bn syncbn sync_batchnorm norm_layer": ("norm", "one of its options, as norm=sync"),
    "logger wandb mlflow": ("tracking", "mlflow or journal"),
    "tracking_uri mlflow_uri mlflow_tracking_uri": ("tracking.uri", ""),
    "experiment_name project project_name": ("tracking.experiment", ""),
    "timeout": ("launcher.timeout_s", "in seconds"),
    "max_time time_limit": ("train.time_limit_s", "in seconds"),
}
"""Words of other programs, to our key and what is to be known of its value."""

_WHOLE: Mapping[str, tuple[str, str]] = {
    "model_name": ("model", "one of its options, as model=cnn"),
    "data.num_workers": ("data.num_loaders", "processes beside each rank"),
}
"""Keys whose last part has another meaning elsewhere."""

_BY_WORD = {word: meant for words, meant in SYNONYMS.items() for word in words.split()}


def known_keys(tree: Mapping[str, Any] | None = None, prefix: str = "") -> list[str]:
    """All dotted keys of the schema."""
    keys = []
    for key, value in (asdict(Config()) if tree is None else tree).items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += known_keys(value, f"{prefix}{key}.")
    return keys


def instead_of(key: str) -> str:
    """What to give in place of the unknown `key`, as the end of a sentence: "" where nothing is like it."""
    key = key.lower().replace("-", "_")
    word = key.rsplit(".", 1)[-1]
    known = _WHOLE.get(key) or _BY_WORD.get(word)
    if known is not None:
        meant, of_its_value = known
        return f": here it is {meant}{f' ({of_its_value})' if of_its_value else ''}"
    near = _nearest(word, key.rpartition(".")[0])
    return f"; did you mean {near!r}?" if near else ""


def _nearest(word: str, group: str) -> str | None:
    """The key whose last part is most like `word`, first of those in `group`."""
    keys = list(reversed(known_keys()))
    for among in ([key for key in keys if key.rpartition(".")[0] == group], keys):
        by_last_part = {key.rsplit(".", 1)[-1]: key for key in among}
        match = difflib.get_close_matches(word, by_last_part, n=1, cutoff=_NEAR)
        if match:
            return by_last_part[match[0]]
    return None
