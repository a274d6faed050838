"""Whether a checkpoint fits the run that wants to resume from it, in words that name what does not."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from syncbn.checkpoint.store import Checkpoint
from syncbn.errors import CheckpointError


def check_matches(
    checkpoint: Checkpoint, config_hash: str, world_size: int, global_batch: int
) -> list[str]:
    """What to tell the user before `checkpoint` is resumed at `world_size`; empty where it is bit-exact.

    Raises:
        CheckpointError: it was made by another config, or with another global batch.
    """
    meta, path = checkpoint.meta, checkpoint.path
    remedy = "give this run another name, or train.resume=false"
    for what, saved, wanted in (
        ("global batch", meta.global_batch, global_batch),
        ("config", meta.config_hash, config_hash),
    ):
        if saved != wanted:
            raise CheckpointError(
                f"{path} was made with {what} {saved}, this run has {wanted}: {remedy}"
            )
    if meta.world_size == world_size:
        return []
    return [
        f"resuming on {world_size} ranks a run saved on {meta.world_size}: same global batch "
        f"of {global_batch} and same sample order, but sums round differently"
    ]


def restore_model(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load `state` into `model`; what to tell the user about it is returned.

    A `module.` prefix on every name (a state saved from within DistributedDataParallel) is taken off.

    Raises:
        CheckpointError: names, shapes or dtypes differ; each of the first few is named.
    """
    own, notes, prefix = model.state_dict(), [], "module."
    if _all_start_with(state, prefix) and not _all_start_with(own, prefix):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        notes = [
            f"took {prefix!r} off every name in the checkpoint: it was saved from a wrapped model"
        ]
    differences = _differences(own, state)
    if differences:
        raise CheckpointError(f"the checkpoint is of another architecture: {differences}")
    model.load_state_dict(dict(state))
    return notes


def _all_start_with(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _differences(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str:
    """How `saved` differs from `own` in names, shapes and dtypes, the first three of each kind; "" where not."""
    kinds = {
        "missing": [name for name in own if name not in saved],
        "unexpected": [name for name in saved if name not in own],
        "different": [
            f"{name} is {_form(saved[name])}, the model has {_form(own[name])}"
            for name in own
            if name in saved and _form(saved[name]) != _form(own[name])
        ],
    }
    return "; ".join(
        f"{kind}: {', '.join(items[:3])}"
        + (f" and {len(items) - 3} more" if len(items) > 3 else "")
        for kind, items in kinds.items()
        if items
    )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
