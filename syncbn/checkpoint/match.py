"""Whether a checkpoint fits the run that wants to resume from it, in words that name what does not."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from syncbn.checkpoint.store import Checkpoint
from syncbn.errors import CheckpointError
from syncbn.sharded import shared_out, shared_out_beside


def check_matches(
    checkpoint: Checkpoint, world_size: int, global_batch: int, parallel: str = "ddp"
) -> list[str]:
    """What to tell the user before `checkpoint` is resumed so; empty where it is bit-exact.

    Raises:
        CheckpointError: it was made with another global batch.
    """
    meta = checkpoint.meta
    if meta.global_batch != global_batch:
        raise CheckpointError(
            f"{checkpoint.path} was made with a global batch (train.per_rank_batch on all ranks) of "
            f"{meta.global_batch}, this run has {global_batch}: give this run another name, or train.resume=false"
        )
    notes = []
    if meta.world_size != world_size:
        notes.append(
            f"resuming on {world_size} ranks a run saved on {meta.world_size}: same global batch "
            f"of {global_batch} and same sample order, but sums round differently"
        )
    if meta.parallel != parallel:
        notes.append(
            f"resuming with train.parallel={parallel} a run saved with {meta.parallel}: sums round differently"
        )
    return notes


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
    model.load_state_dict({name: shared_out(tensor, own[name]) for name, tensor in state.items()})
    return notes


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load `state`, an optimiser's state_dict of whole tensors, into `optimizer`.

    Whether its step is fused stays as it was built: that depends on how parameters are spread over ranks.
    """
    groups = [
        saved | {key: own[key] for key in ("fused",) if key in own}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    parameters = {
        number: parameter
        for saved, own in zip(groups, optimizer.param_groups, strict=False)
        for number, parameter in zip(saved["params"], own["params"], strict=False)
    }
    states = {
        number: {k: shared_out_beside(value, parameters[number]) for k, value in values.items()}
        for number, values in state["state"].items()
        if number in parameters
    }
    optimizer.load_state_dict({**state, "param_groups": groups, "state": states})


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
