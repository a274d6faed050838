"""Memory for results: ordinary tensors, whose memory is used again once the last of them has gone, and not before.

What they allow: views, in-place operations, `share_memory_`, copying, saving and shrinking with `resize_`. Growing is
refused with torch's own "storage that is not resizable".
"""

import copy
import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.norm.backends import cpu
from syncbn.norm.backends.cpu import SMALLEST_KEPT_BYTES, geometry_of, release_memory
from syncbn.norm.native import library

if library() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

MIB = 2**20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release_memory()
    yield
    release_memory()


def empty_like(x: Tensor) -> Tensor:
    shape = x.shape if x.dim() > 1 else torch.Size((1, len(x)))
    return cpu._empty(x, geometry_of(shape, x.stride(), x.dtype))


def result(bytes: int = 4 * MIB) -> Tensor:
    return empty_like(torch.empty(bytes // 4))


def idle(size: int = 4 * MIB) -> int:
    """The address of memory that is ready to be used again."""
    return result(size).data_ptr()


FORMS = {
    "two dimensions": torch.randn(700, 900),
    "three dimensions": torch.randn(70, 30, 300),
    "planes": torch.randn(9, 30, 50, 51),
    "channels last": torch.randn(9, 30, 50, 51).contiguous(memory_format=torch.channels_last),
    "volumes": torch.randn(3, 30, 20, 21, 19),
    "volumes, channels last": torch.randn(3, 30, 20, 21, 19).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "one sample of many": torch.randn(2, 30, 150, 151)[1:],
    "every second sample": torch.randn(18, 30, 50, 51)[::2],
    "one channel": torch.randn(9, 1, 250, 251).contiguous(memory_format=torch.channels_last),
    "one value of each channel": torch.randn(9000, 100, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x", FORMS.values(), ids=FORMS)
def test_results_look_like_those_of_torch(x: Tensor, dtype: torch.dtype):
    x = x.to(dtype).requires_grad_()
    ours, theirs = empty_like(x), torch.empty_like(x)
    assert not ours.untyped_storage().resizable()  # it is not torch's own
    for attribute in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.stride() == theirs.stride()
    assert ours.storage_offset() == 0
    assert torch.equal(ours.copy_(x.detach()), x)


def test_small_results_and_those_of_subclasses_are_torchs():
    class Special(Tensor):
        pass

    assert not result(SMALLEST_KEPT_BYTES).untyped_storage().resizable()
    assert result(SMALLEST_KEPT_BYTES - 4).untyped_storage().resizable()
    special = empty_like(torch.empty(MIB).as_subclass(Special))
    assert type(special) is Special
    assert special.untyped_storage().resizable()


def test_a_layer_keeps_the_class_of_a_large_input():
    class Special(Tensor):
        pass

    x = torch.randn(16, 64, 16, 16).as_subclass(Special)
    assert type(syncbn.sync_batch_norm(x)) is Special


def test_inference_mode_makes_inference_tensors():
    with torch.inference_mode():
        assert result().is_inference()
    assert not result().is_inference()


def test_torch_serves_where_nothing_can_be_mapped(monkeypatch: pytest.MonkeyPatch):
    _, capsule = cpu._allocator()
    monkeypatch.setattr(cpu, "_allocator", lambda: (lambda *_: None, capsule))
    x = torch.randn(9, 30, 50, 51).contiguous(memory_format=torch.channels_last)
    y = empty_like(x)
    assert y.untyped_storage().resizable()
    assert y.stride() == x.stride()


def test_without_a_library_there_is_nothing_to_release(monkeypatch: pytest.MonkeyPatch):
    idle()
    with monkeypatch.context() as context:
        context.setattr(cpu, "library", lambda: None)
        assert release_memory() == 0
    assert release_memory() > 0


KEEPERS = {
    "a view": lambda y: y[5:7],
    "a detached tensor": lambda y: y.detach(),
    "an array": lambda y: y.numpy(),
    "a storage": lambda y: y.untyped_storage(),
    "an exported tensor": lambda y: torch.from_dlpack(y),
    "a graph": lambda y: torch.ones(len(y), requires_grad=True) * y,
}


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=KEEPERS)
def test_memory_comes_back_with_the_last_that_uses_it(keep):
    y = result()
    place, kept = y.data_ptr(), keep(y)
    del y
    other = result()
    assert other.data_ptr() != place
    assert release_memory() == 0
    del kept
    assert idle() == place
    del other
    assert release_memory() == 8 * MIB


def test_the_most_recent_memory_of_a_size_is_used_first():
    first, second = result(), result()
    places = first.data_ptr(), second.data_ptr()
    del first, second
    assert (idle(), idle()) == (places[1],) * 2


def test_no_more_is_kept_than_was_in_use_at_once():
    idle(4 * MIB)
    idle(6 * MIB)
    idle(5 * MIB)
    assert release_memory() == 5 * MIB


def test_other_sizes_are_dropped_oldest_first():
    several = [result(size * MIB) for size in (4, 5, 6)]
    newest = several[-1].data_ptr()
    while several:
        several.pop(0)
    one = result(7 * MIB)
    assert idle(6 * MIB) == newest
    assert release_memory() == 6 * MIB
    del one
    assert release_memory() == 7 * MIB


def test_the_bound_falls_to_what_is_in_use_with_a_release():
    large = [result(), result()]
    large.clear()
    assert release_memory() == 8 * MIB
    idle(4 * MIB)
    idle(5 * MIB)
    assert release_memory() == 5 * MIB


def test_results_of_several_threads_never_overlap():
    wrong = []

    def work(number: int) -> None:
        live = []
        for step in range(60):
            value = 1000.0 * number + step
            live.append((value, result(SMALLEST_KEPT_BYTES * (1 + step % 3)).fill_(value)))
            if len(live) > 3:
                expected, y = live.pop(step % 3)
                wrong.extend([y] if not bool((y == expected).all()) else [])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_can_be_shared_copied_saved_and_shrunk():
    y = result().fill_(3)
    twin = copy.deepcopy(y)
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    saved = torch.load(file)
    shared = result().fill_(3).share_memory_()
    for other in (twin, saved, shared):
        assert other.data_ptr() != y.data_ptr()
        assert torch.equal(other, y)
    assert shared.is_shared()
    assert y.resize_(7).tolist() == [3] * 7
    with pytest.raises(RuntimeError, match="storage that is not resizable"):
        y.resize_(2 * MIB)


def test_shared_results_give_their_memory_back():
    y = result()
    place = y.data_ptr()
    y.share_memory_()
    assert idle() == place


def in_child(work: Callable[[], bool]) -> int:
    """What a forked child ends with that does `work`: 0 where it went well, a signal's number where it hung."""
    tracer = sys.gettrace()
    sys.settrace(None)  # coverage's has a lock, which a thread that the child lacks may hold
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # a busy machine is slow; a child that hangs does so until then
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if work() else 1
        finally:  # an error here must not go on in the tests that follow
            # the C function: under coverage Python's saves what was traced, behind the same lock
            ctypes.CDLL(None)._exit(status)
    sys.settrace(tracer)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_has_memory_of_its_own():
    y, place = result().fill_(1), idle(8 * MIB)

    def child() -> bool:
        z = result(8 * MIB).fill_(2)
        y.fill_(5)
        return z.data_ptr() == place and float(z.sum()) == 4 * MIB

    assert in_child(child) == 0
    assert float(y.sum()) == MIB


@pytest.mark.untraced
def test_a_child_forked_while_others_take_memory_does_not_hang():
    done = threading.Event()

    def busy() -> None:
        while not done.is_set():
            several = [result(MIB) for _ in range(4)]
            several.clear()
            release_memory()

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(in_child(lambda: idle() > 0) == 0 for _ in range(60))
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_uses_the_same_memory_in_every_step_and_stays_right(layout: torch.memory_format):
    ours, theirs = syncbn.SyncBatchNorm(64), nn.BatchNorm2d(64)
    places = []
    for _ in range(4):
        batch = torch.randn(20, 64, 30, 30).contiguous(memory_format=layout)
        weights = torch.randn_like(batch)
        x, twin = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        y, expected = ours(x), theirs(twin)
        places.append(y.data_ptr())
        # in place, and smooth: a value beside a kink may lie on the other side of it
        (y.sigmoid_() * weights).sum().backward()
        (expected.sigmoid() * weights).sum().backward()
        torch.testing.assert_close(y, expected.sigmoid(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad, twin.grad, atol=1e-5, rtol=1e-4)
        places.append(x.grad.data_ptr())
        assert not y.untyped_storage().resizable()
        del y, x
    assert set(places[2:]) == set(places[:2])
