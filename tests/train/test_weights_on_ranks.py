"""Weights on several ranks: rank 0 alone reads them."""

import pytest
import torch
import torch.distributed as dist

from syncbn.config import DataConfig, LauncherConfig, ModelConfig, RunConfig, TrainConfig
from syncbn.models import build_model
from syncbn.runtime import TorchrunRuntime
from syncbn.train.state import build

pytestmark = pytest.mark.untraced


@pytest.mark.world_size(2)
def test_every_rank_starts_from_what_rank_0_reads(world_size, tmp_path):
    given = build_model(ModelConfig(hidden=[8]), (1, 8, 8), 10, seed=5)
    given.hidden[0].norm.running_mean.fill_(0.5)
    expected = given.state_dict()
    rank = dist.get_rank()
    if rank == 0:
        torch.save(given.state_dict(), tmp_path / "given.pt")
    cfg = RunConfig(
        runs_dir=str(tmp_path),
        model=ModelConfig(
            hidden=[8], weights=str(tmp_path / ("given.pt" if rank == 0 else "no.pt"))
        ),
        data=DataConfig(limit=64),
        train=TrainConfig(per_rank_batch=16),
        launcher=LauncherConfig(num_workers=world_size),
    )
    model = build(cfg, TorchrunRuntime(torch.device("cpu"))).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
