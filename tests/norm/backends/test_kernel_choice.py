"""Which kernels serve which device, and what `SYNCBN_KERNELS` changes about it."""

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
from syncbn.norm import native as sources
from syncbn.norm.backends import EagerKernels, choice, pick
from syncbn.norm.backends import cpu as native
from syncbn.norm.backends.choice import chosen
from syncbn.norm.backends.cpu import CpuKernels
from syncbn.norm.native import library

compiled = pytest.mark.skipif(library() is None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def _unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    chosen.cache_clear()
    yield
    chosen.cache_clear()


def without_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "library", lambda: None)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "_declared", native._declared.__wrapped__)


@compiled
def test_a_cpu_is_served_by_native_code():
    assert isinstance(pick(torch.ones(2, 2)), CpuKernels)


def test_without_the_library_one_warning_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    without_library(monkeypatch)
    with pytest.warns(RuntimeWarning, match="compiler is at hand when the package is installed"):
        assert isinstance(pick(torch.ones(2, 2)), EagerKernels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pick(torch.ones(2, 2))


def test_a_library_of_other_sources_or_none_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "ABI", sources.ABI + 1)
    assert library.__wrapped__() is None
    monkeypatch.setattr(sources.sysconfig, "get_config_var", lambda name: ".nothing")
    assert library.__wrapped__() is None


def test_cuda_is_served_by_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("syncbn.norm.backends.triton.kernels")
    assert isinstance(chosen("cuda"), triton.TritonKernels)
    monkeypatch.setitem(sys.modules, "syncbn.norm.backends.triton.kernels", None)
    chosen.cache_clear()
    assert isinstance(chosen("cuda"), EagerKernels)


def test_other_devices_are_served_by_aten():
    assert isinstance(chosen("meta"), EagerKernels)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_aten_can_be_asked_for_anywhere(monkeypatch: pytest.MonkeyPatch, device: str):
    monkeypatch.setenv("SYNCBN_KERNELS", "eager")
    assert isinstance(chosen(device), EagerKernels)


@compiled
def test_native_code_can_be_asked_for_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "cpu")
    assert isinstance(chosen("cpu"), CpuKernels)
    with pytest.raises(RuntimeError, match="'cpu' cannot serve a tensor on 'cuda'"):
        chosen("cuda")


def test_native_code_that_was_not_built_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "cpu")
    without_library(monkeypatch)
    with pytest.raises(RuntimeError, match="was not built"):
        chosen("cpu")


def test_triton_serves_a_cpu_only_as_an_interpreter(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("syncbn.norm.backends.triton.kernels")
    monkeypatch.setenv("SYNCBN_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="'triton' cannot serve a tensor on 'cpu'"):
        chosen("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(chosen("cpu"), triton.TritonKernels)


def test_triton_that_is_not_installed_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "triton")
    monkeypatch.setitem(sys.modules, "syncbn.norm.backends.triton.kernels", None)
    with pytest.raises(RuntimeError, match="needs Triton"):
        chosen("cuda")


def test_a_name_that_is_none_is_answered_with_those_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNCBN_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast' is not allowed: one of eager, cpu, triton"):
        chosen("cpu")


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
