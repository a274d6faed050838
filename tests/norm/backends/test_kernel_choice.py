"""Which backend serves a device and a pass, and what `SYNCBN_KERNELS` changes about it."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import syncbn
from syncbn.norm import backends
from syncbn.norm import native as sources
from syncbn.norm.backends import cpu as native
from syncbn.norm.backends import faster_alone, selected
from syncbn.norm.backends.aten import AtenBackend
from syncbn.norm.backends.base import Backend, NormArgs
from syncbn.norm.backends.cpu import CpuBackend, CpuFallback
from syncbn.norm.native import library

compiled = pytest.mark.skipif(library() is None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    selected.cache_clear()
    yield
    selected.cache_clear()


def without_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "library", lambda: None)
    monkeypatch.setattr(native, "library", lambda: None)


@compiled
def test_a_cpu_is_served_by_native_code():
    assert isinstance(selected("cpu"), CpuBackend)


def test_without_the_library_one_warning_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    without_library(monkeypatch)
    with pytest.warns(RuntimeWarning, match="compiler is at hand when the package is installed"):
        assert isinstance(selected("cpu"), AtenBackend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selected("cpu")


def test_a_library_of_other_sources_or_none_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ABI", -1)
    assert library.__wrapped__() is None
    monkeypatch.setattr(sources.sysconfig, "get_config_var", lambda name: ".nothing")
    assert library.__wrapped__() is None


def test_cuda_is_served_by_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("syncbn.norm.backends.triton.backend")
    assert isinstance(selected("cuda"), triton.TritonBackend)
    monkeypatch.setitem(sys.modules, "syncbn.norm.backends.triton.backend", None)
    selected.cache_clear()
    assert isinstance(selected("cuda"), AtenBackend)


def test_other_devices_are_served_by_aten():
    assert isinstance(selected("meta"), AtenBackend)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_aten_can_be_asked_for_anywhere(monkeypatch: pytest.MonkeyPatch, device: str):
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    assert isinstance(selected(device), AtenBackend)


@compiled
def test_native_code_can_be_asked_for_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "cpu")
    assert isinstance(selected("cpu"), CpuBackend)
    with pytest.raises(RuntimeError, match="'cpu' cannot serve a tensor on 'cuda'"):
        selected("cuda")


def test_native_code_that_was_not_built_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "cpu")
    without_library(monkeypatch)
    with pytest.raises(RuntimeError, match="was not built"):
        selected("cpu")


def test_triton_serves_a_cpu_only_as_an_interpreter(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("syncbn.norm.backends.triton.backend")
    monkeypatch.setenv("SYNCBN_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' cannot serve a tensor on 'cpu'"):
        selected("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(selected("cpu"), triton.TritonBackend)


def test_triton_that_is_not_installed_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "triton")
    monkeypatch.setitem(sys.modules, "syncbn.norm.backends.triton.backend", None)
    with pytest.raises(RuntimeError, match="needs Triton"):
        selected("cuda")


def test_a_name_that_is_none_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast' is not allowed: one of eager, cpu, triton"):
        selected("cpu")


class Special(torch.Tensor):
    """A subclass, whose memory may be no plain array."""


def serving(x: torch.Tensor, backend: Backend | None = None, **more: object) -> Backend:
    """The backend of a pass of this rank alone."""
    backend = CpuBackend() if backend is None else backend
    return backend.for_pass(NormArgs(x, **more))


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_native_code_serves_plain_inputs_and_their_residual(dtype: torch.dtype):
    x = torch.ones(4, 3, 5, dtype=dtype)
    for act in (None, "relu", "hardswish"):
        for residual in (None, x):
            backend = serving(x, act=act, residual=residual)
            assert type(backend) is CpuBackend
            assert backend.fused


@compiled
def test_native_code_leaves_to_aten_what_it_has_no_kernels_for():
    x = torch.ones(4, 3, 5)
    exotic = [
        serving(x, mask=torch.ones(4, 1, 5, dtype=torch.bool)),
        serving(x, residual=x.bfloat16()),
        serving(x, residual=x.as_subclass(Special)),
        serving(x.double(), act="silu"),
        serving(x[:0]),
    ]
    assert {type(backend) for backend in exotic} == {CpuFallback}
    for other in (x.as_subclass(Special), x.to("meta")):
        assert type(serving(other)) is AtenBackend


def test_triton_leaves_subclasses_and_tensors_without_memory_to_aten():
    triton = pytest.importorskip("syncbn.norm.backends.triton.backend").TritonBackend()
    x = torch.ones(4, 3, 5)
    for plain in (x, torch.nn.Parameter(x), x[:0]):
        assert serving(plain, triton) is triton
    for other in (x.as_subclass(Special), x.to("meta")):
        assert type(serving(other, triton)) is AtenBackend


def test_aten_serves_every_pass():
    aten = AtenBackend()
    assert serving(torch.ones(2, 2).as_subclass(Special), aten) is aten


@compiled
def test_a_rank_alone_uses_native_code_for_large_inputs(monkeypatch: pytest.MonkeyPatch):
    large, small = torch.empty(64, 32, 64), torch.empty(64, 32, 63)
    assert faster_alone(large)
    assert not faster_alone(small)
    assert not faster_alone(large.as_subclass(Special))
    assert not faster_alone(large.to("meta"))
    assert not faster_alone(large.bfloat16())
    assert faster_alone(torch.empty(256, 32, 64).bfloat16())
    inside = []
    torch.func.vmap(lambda x: inside.append(faster_alone(large)) or x)(torch.ones(2))
    assert inside == [False]
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    selected.cache_clear()
    assert not faster_alone(large)


@compiled
def test_sources_that_stand_before_the_installed_package_use_its_library(tmp_path: Path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(syncbn.__file__).parent, tmp_path / "syncbn", ignore=ignore)
    program = "from syncbn.norm import native; print(native.__file__, native.library() is not None)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    assert said.split() == [str(tmp_path / "syncbn/norm/native/__init__.py"), "True"]


class Installed:
    """Enough of `importlib.metadata.Distribution`."""

    def __init__(self, origin: str | None) -> None:
        self.origin = origin

    def read_text(self, name: str) -> str | None:
        return self.origin

    def locate_file(self, path: str) -> Path:
        return Path("/site-packages") / path


@pytest.mark.parametrize(
    ("origin", "folder"),
    [
        (None, "/site-packages/syncbn/norm/native"),
        ('{"url": "file:///a/b", "dir_info": {}}', "/site-packages/syncbn/norm/native"),
        ('{"url": "file:///a/b", "dir_info": {"editable": true}}', "/a/b/syncbn/norm/native"),
    ],
)
def test_the_installed_package_is_where_it_says(monkeypatch, origin: str | None, folder: str):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(origin))
    assert sources._installed_folder() == Path(folder)


def test_a_bare_checkout_has_no_installed_package(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Installed:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert sources._installed_folder() == Path()


@compiled
@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_operands_of_another_class_keep_a_pass_from_the_kernels(name: str):
    x = torch.ones(4, 3, 5)
    other = (x if name == "residual" else x[0, :, 0]).as_subclass(Special)
    backend = CpuBackend().for_pass(NormArgs(x, **{name: other}))
    assert type(backend) is CpuFallback
