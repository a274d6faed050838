"""How Triton's kernels are launched, without a GPU: what was compiled is found again, and only where it may be used."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from syncbn.norm.backends.triton import launch as module
from syncbn.norm.backends.triton import tile_plan


class Compiled:
    """What Triton gives back for a launch; it notes how it is run itself."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple] = []

    def run(self, *arguments: object) -> None:
        self.runs.append(arguments)


class Kernel:
    """A kernel that notes what it is launched with, each time with other code."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.code: list[Compiled] = []
        self.fn = self

    def __getitem__(self, grid: tuple[int, int]):
        def launch(*arguments: object, **options: object) -> Compiled:
            self.launches.append((grid, arguments, options))
            self.code.append(Compiled())
            return self.code[-1]

        return launch


def tensor(address: int, dtype: torch.dtype = torch.float32, device: int = 0):
    """As far as a launch looks at a tensor of a GPU."""
    place = SimpleNamespace(index=device, type="cuda")
    methods = {"data_ptr": lambda: address, "get_device": lambda: device}
    return SimpleNamespace(device=place, dtype=dtype, **methods)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    stream = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7 + device))
    monkeypatch.setattr(module, "driver", stream)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_direct", True)
    return Kernel()


def launch(kernel: Kernel, tensors: list, numbers=(3, 0.5), statics=(64, True, 4), grid=(2, 5)):
    module.launch(kernel, grid, tuple(tensors), numbers, statics)


def test_the_first_launch_is_tritons_and_the_second_runs_what_it_compiled(kernel: Kernel):
    first = [tensor(32), None, tensor(48)]
    launch(kernel, first)
    ((grid, arguments, options),) = kernel.launches
    assert grid == (2, 5)
    assert arguments == (*first, 3, 0.5, 64, True)
    assert options == {"num_warps": 4, "enable_fp_fusion": False}
    launch(kernel, [tensor(64), None, tensor(80)], numbers=(9, 0.25), grid=(3, 6))
    assert len(kernel.launches) == 1
    place, code, hooks = (3, 6, 1, 7), ("function", "metadata"), (None, None, None)
    assert kernel.code[0].runs == [(*place, *code, *hooks, 64, 0, 80, 9, 0.25, 64, True)]


@pytest.mark.parametrize(
    "other",
    [
        {"tensors": [tensor(32, torch.bfloat16), None, tensor(48)]},
        {"tensors": [tensor(32), tensor(16), tensor(48)]},
        {"tensors": [tensor(32), None, tensor(48)], "statics": (32, True, 4)},
        {"tensors": [tensor(32), None, tensor(48)], "statics": (64, True, 8)},
        {"tensors": [tensor(32), None, tensor(52)]},
        {"tensors": [tensor(32), None, tensor(48)], "numbers": (2**31, 0.5)},
        {"tensors": [tensor(32), None, tensor(48, device=-1)]},
    ],
    ids=["dtype", "operands", "static", "warps", "alignment", "wide number", "on the CPU"],
)
def test_what_another_launch_needs_other_code_for_is_left_to_triton(kernel: Kernel, other: dict):
    launch(kernel, [tensor(32), None, tensor(48)])
    launch(kernel, **other)
    assert len(kernel.launches) == 2
    assert kernel.code[0].runs == []


def test_on_another_device_triton_launches_there(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    devices = []

    class Device:
        def __init__(self, tensor) -> None:
            self.index = tensor.device.index

        def __enter__(self) -> None:
            devices.append(self.index)

        def __exit__(self, *error: object) -> None:
            devices.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    for _ in range(2):
        launch(kernel, [tensor(32, device=1)])
    assert devices == [1, None, 1, None]
    assert len(kernel.launches) == 2


def test_an_untested_version_of_triton_launches_itself(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_direct", False)
    for _ in range(2):
        launch(kernel, [tensor(32)])
    assert len(kernel.launches) == 2


def test_the_installed_version_of_triton_is_a_tested_one():
    assert module._direct


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_that_wants_to_know_of_launches_is_told(kernel: Kernel, hook: str):
    hooks = getattr(module.knobs.runtime, hook)
    launch(kernel, [tensor(32)])
    hooks.add(print)
    try:
        launch(kernel, [tensor(32)])
    finally:
        hooks.remove(print)
    assert len(kernel.launches) == 2


def test_a_gpu_is_asked_how_many_multiprocessors_it_has(monkeypatch: pytest.MonkeyPatch):
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert tile_plan.num_multiprocessors(torch.device("cuda", 0)) == 132
    assert tile_plan.num_multiprocessors(torch.device("cpu")) == 1
