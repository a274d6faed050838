"""What the tests of checkpoints share: tiny states whose every value tells the step they were saved at."""

import torch
from torch import nn

from syncbn.checkpoint import Checkpoint, Meta, load_latest, save

FILES = ("model.safetensors", "state.pt", "meta.json", "manifest.json")


def meta_at(step):
    return Meta(step, step * 8, config_hash="abc", world_size=2, global_batch=8, rng=["AA=="])


def model_at(step):
    """A state whose every value tells its step."""
    return {"weight": torch.full((3, 2), float(step)), "bn.num_batches_tracked": torch.tensor(step)}


def save_step(folder, step, **options):
    return save(folder, model_at(step), {"state": {}, "param_groups": []}, meta_at(step), **options)


def latest(folder) -> Checkpoint:
    """What is resumed from, which must be something."""
    found = load_latest(folder)
    assert found is not None
    return found


def load_step(folder):
    """The step that is resumed from, after checking that model and meta tell the same."""
    found = latest(folder)
    assert torch.equal(found.model_state["weight"], model_at(found.meta.step)["weight"])
    return found.meta.step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def small_net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def no_temporary(folder):
    return not [name for name in names(folder) if name.startswith(".tmp-")]
