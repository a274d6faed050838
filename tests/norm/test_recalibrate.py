"""`recalibrate` sets the population statistics of all data on all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close, own_part
from torch import nn

import syncbn


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU()).double()


@pytest.mark.world_size(1, 2, 3)
def test_statistics_are_the_exact_moments_of_everything_that_entered_the_layer(world_size):
    whole = torch.randn(24, 3, dtype=torch.float64) * 2 + 1
    sizes = {1: (24,), 2: (15, 9), 3: (12, 6, 6)}[world_size]
    model = _model().eval()
    before = copy.deepcopy(model)
    syncbn.recalibrate(model, [(part, None) for part in own_part(whole, sizes).chunk(3)])
    entered = model[0](whole)
    assert_close(model[1].running_mean, entered.mean(0), 1e-12)
    assert_close(model[1].running_var, entered.var(0), 1e-12)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[1].num_batches_tracked, before[1].num_batches_tracked)
    assert torch.equal(model[1].weight, before[1].weight)


@pytest.mark.world_size(2)
def test_a_rank_without_data_still_gets_everybodys_statistics(world_size):
    whole = torch.randn(8, 3, dtype=torch.float64)
    model = _model()
    syncbn.recalibrate(model, [whole] if dist.get_rank() == 0 else [])
    assert_close(model[1].running_mean, model[0](whole).mean(0), 1e-12)


def test_a_failure_on_the_way_leaves_the_model_as_it_was():
    model = _model().eval()

    def loader():
        yield torch.randn(4, 3, dtype=torch.float64)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        syncbn.recalibrate(model, loader())
    assert torch.equal(model[1].running_mean, torch.zeros(5, dtype=torch.float64))
    assert not model.training
    assert not model[1]._forward_pre_hooks


def test_other_buffers_come_back_and_a_layer_without_data_changes_nothing():
    model = nn.ModuleDict(
        {"used": nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))}
    )
    model.forward = model["used"].forward
    before = [buffer.clone() for buffer in model["used"][0].buffers()]
    syncbn.recalibrate(model, [torch.randn(4, 3, 5) + 2])
    assert all(torch.equal(a, b) for a, b in zip(model["used"][0].buffers(), before, strict=True))
    mean = model["used"][1].running_mean.clone()
    model["unused"] = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="no data reached layer 'unused'"):
        syncbn.recalibrate(model, [torch.randn(4, 3, 5)])
    assert torch.equal(model["used"][1].running_mean, mean)


def test_nothing_to_recalibrate_is_said():
    with pytest.raises(ValueError, match="no batch norm"):
        syncbn.recalibrate(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="no data reached layer '1'"):
        syncbn.recalibrate(_model(), [])


@pytest.mark.world_size(2)
def test_a_rank_may_take_its_own_data_alone_and_asks_nobody(world_size):
    whole, model = torch.randn(8, 3, dtype=torch.float64), _model()
    if dist.get_rank() == 0:
        syncbn.recalibrate(model, [whole], process_group=1)
        assert_close(model[1].running_mean, model[0](whole).mean(0), 1e-12)


@pytest.mark.world_size(2)
def test_a_rank_alone_is_refused_where_its_layers_wait_for_others(world_size):
    model = syncbn.convert_sync_batchnorm(_model())
    with pytest.raises(ValueError, match=r"process_group has ranks \[\d\], but layer '1' is sync"):
        syncbn.recalibrate(model, [torch.randn(8, 3, dtype=torch.float64)], process_group=1)


class Conditional(nn.BatchNorm1d):
    """A local norm whose second argument is no mask."""

    def forward(self, x, label):
        return super().forward(x) * label


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_of_a_norm_of_another_class_are_not_taken_for_a_mask(by_name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Conditional(3)

        def forward(self, x):
            label = torch.ones(len(x), 1)
            return self.norm(x=x, label=label) if by_name else self.norm(x, label)

    model, x = Model(), torch.randn(8, 3)
    syncbn.recalibrate(model, [x])
    assert_close(model.norm.running_mean, x.mean(0), 1e-6)
