"""`recalibrate` over ranks that hold different numbers of batches, and over a part of the ranks."""

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from torch import nn

import syncbn

BATCHES = {2: (3, 1), 3: (1, 4, 0)}
"""Batches of four samples a rank."""


def _model():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
    ]
    return nn.Sequential(*layers).double()


def _shares(world_size):
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(4, 2, 7, 7, generator=generator, dtype=torch.float64) for _ in range(count)]
        for count in BATCHES[world_size]
    ]


def _expected(shares):
    """Populations when, in every step, what the ranks hold of it is one batch."""
    model = _model()
    steps = [
        torch.cat([share[step] for share in shares if step < len(share)])
        for step in range(max(map(len, shares)))
    ]
    syncbn.recalibrate(model, steps, process_group=1)
    return model


@pytest.mark.world_size(2, 3)
def test_ranks_that_run_out_take_part_until_the_last_batch(world_size):
    shares = _shares(world_size)
    model = syncbn.convert_sync_batchnorm(_model())
    syncbn.recalibrate(model, [(batch, "no tensor") for batch in shares[dist.get_rank()]])
    expected = _expected(shares)
    for name, buffer in model.named_buffers():
        assert_close(buffer.double(), expected.get_buffer(name).double(), 1e-12, name)


@pytest.mark.world_size(2)
def test_a_loader_that_fails_on_one_rank_fails_on_all(world_size):
    def loader():
        yield torch.randn(4, 2, 7, 7, dtype=torch.float64)
        if dist.get_rank() == 1:
            raise OSError("disk gone")
        yield torch.randn(4, 2, 7, 7, dtype=torch.float64)

    model = syncbn.convert_sync_batchnorm(_model())
    error = (OSError, "disk gone") if dist.get_rank() == 1 else (RuntimeError, "rank 1 failed")
    with pytest.raises(error[0], match=error[1]):
        syncbn.recalibrate(model, loader())
    assert torch.equal(model[1].running_mean, torch.zeros(3, dtype=torch.float64))


@pytest.mark.world_size(2)
def test_no_data_anywhere_is_the_same_error_everywhere(world_size):
    with pytest.raises(ValueError, match="no data reached layer '1'"):
        syncbn.recalibrate(syncbn.convert_sync_batchnorm(_model()), [])


@pytest.mark.world_size(3)
def test_a_group_takes_its_own_data_alone(world_size):
    pair = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return
    shares = _shares(world_size)[:2]
    model = syncbn.convert_sync_batchnorm(_model(), process_group=pair)
    syncbn.recalibrate(model, shares[dist.get_rank()], process_group=pair)
    expected = _model()
    assert_close(
        model[1].running_mean,
        expected[0](torch.cat(shares[0] + shares[1])).mean((0, 2, 3)),
        1e-12,
    )


@pytest.mark.world_size(2)
def test_layers_synchronised_beyond_the_group_are_refused(world_size):
    model = syncbn.convert_sync_batchnorm(_model())
    with pytest.raises(ValueError, match=r"has ranks \[\d\], but layer '1' .*over \[0, 1\]"):
        syncbn.recalibrate(model, [torch.randn(4, 2, 7, 7).double()], process_group=1)


@pytest.mark.world_size(2)
def test_masked_positions_are_no_part_of_the_population(world_size):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm(3, dtype=torch.float64)

        def forward(self, x):
            return self.norm(x, mask=x[:, :1] > 0)

    whole = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = Masked()
    syncbn.recalibrate(model, [whole.chunk(2)[dist.get_rank()]])
    kept = whole.transpose(1, 2)[whole[:, 0] > 0]
    assert_close(model.norm.running_mean, kept.mean(0), 1e-12)
    assert_close(model.norm.running_var, kept.var(0), 1e-12)
