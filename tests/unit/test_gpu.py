"""The same function on a GPU, over NCCL: equal to torch's BatchNorm, and never waiting for the device."""

import pytest
import torch
import torch.distributed as dist
from oracle import assert_close
from torch import nn

import syncbn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def nccl(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_synchronised_path_matches_float64_on_the_cpu(nccl, memory_format):
    whole, dy = torch.randn(8, 6, 5, 5), torch.randn(8, 6, 5, 5)
    x = whole.cuda().to(memory_format=memory_format).requires_grad_()
    running_mean, running_var = torch.zeros(6).cuda(), torch.ones(6).cuda()
    y = syncbn.sync_batch_norm(x, running_mean, running_var, process_group=nccl)
    (dx,) = torch.autograd.grad(y, x, dy.cuda())
    oracle = nn.BatchNorm2d(6, affine=False).double()
    reference = whole.double().requires_grad_()
    expected = oracle(reference)
    (expected_dx,) = torch.autograd.grad(expected, reference, dy.double())
    assert_close(y.cpu(), expected.float(), 1e-4, "output")
    assert_close(dx.cpu(), expected_dx.float(), 1e-4, "input gradient")
    assert_close(running_var.cpu(), oracle.running_var.float(), 1e-4, "running_var")
    assert y.is_contiguous(memory_format=memory_format)


def test_nothing_waits_for_the_device(nccl):
    x = torch.randn(8, 6, 5, 5, device="cuda", requires_grad=True)
    buffers = torch.zeros(6, device="cuda"), torch.ones(6, device="cuda")
    syncbn.sync_batch_norm(
        x, *buffers, process_group=nccl
    ).sum().backward()  # the first call sets NCCL up
    torch.cuda.set_sync_debug_mode("error")
    try:
        syncbn.sync_batch_norm(x, *buffers, process_group=nccl).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
