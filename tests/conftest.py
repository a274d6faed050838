"""Markers for tests that run in processes of their own.

`world_size`: one test function, run plainly in each rank of a gloo group. `triton_interpreter`: run where Triton's
kernels run on the CPU, which is settled once a process, by its environment; both may be asked for. `layer`: given to
every test that may run a line of the layer, by the place, the name or the imports of its module; these alone are run
under coverage. It costs half their time again, and up to three times as much where most of the work is done by Python
code of others, such as Triton's interpreter and torch's compiler: `untraced` tests run without it. That no line is
left to them alone is what the gate of `make test` shows.
"""

import functools
import gc
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from own_ranks import OWN_RANKS
from programs import Bench
from ranks import COVERAGE, RankPool

from syncbn.registry import CALLBACKS, REGISTRIES, TRANSFORMS

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
gc.disable()  # until all tests are collected: nothing is garbage before, and to look for it is 1 s of work
# Several processes share the cores, and torch's threads would wait for each other at work; training sets it too.
torch.set_num_threads(1)

_TESTS = Path(__file__).parent
_LAYER = re.compile(r"^\s*(import syncbn$|from syncbn import|from syncbn\.norm)", re.MULTILINE)
_pool = RankPool()
_interpreter = RankPool(TRITON_INTERPRET="1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "triton_interpreter: run this test where Triton's kernels run on the CPU"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import a module for a part of `make test` that has no test in it: each worker would."""
    chosen = config.getoption("markexpr")
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    if not _is_of_the_layer(collection_path):
        return chosen.endswith(" and layer") or None
    all_traced = "untraced" not in collection_path.read_text()
    return (all_traced and chosen.endswith(" and not layer")) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_of_the_layer(item.path) and item.get_closest_marker("untraced") is None:
            item.add_marker("layer")
        for marker in item.iter_markers("slow_if"):
            if marker.args[0](**item.callspec.params):
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is not looked through again
    gc.enable()


@functools.cache
def _is_of_the_layer(module: Path) -> bool:
    if module.relative_to(_TESTS).parts[0] == "norm" or module.stem.endswith("_on_ranks"):
        return True
    return _LAYER.search(module.read_text()) is not None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("world_size")
    if marker is not None:
        metafunc.parametrize(
            "world_size", marker.args, ids=[f"{size}-ranks" for size in marker.args]
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    interpreted = pyfuncitem.get_closest_marker("triton_interpreter") is not None
    if not interpreted and pyfuncitem.get_closest_marker("world_size") is None:
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    kwargs = {name: pyfuncitem.funcargs[name] for name in names}
    callspec = getattr(pyfuncitem, "callspec", None)
    world_size = 1 if callspec is None else callspec.params.get("world_size", 1)
    pool = _interpreter if interpreted else _pool
    pool.run(pyfuncitem.module.__name__, pyfuncitem.originalname, kwargs, world_size)
    return True


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A place to run programs, none of which outlives the test."""
    bench = Bench(tmp_path)
    yield bench
    bench.kill_all()


@pytest.fixture(scope="session", autouse=True)
def _rank_pool() -> Iterator[None]:
    yield
    OWN_RANKS.close()
    # under coverage ranks end by themselves, to save what they saw; several at once take up to 10 s for it
    traced = COVERAGE in os.environ
    _pool.close(kill=not traced)
    _interpreter.close(kill=not traced)


@pytest.fixture
def own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers goes with it."""
    for registry in (*REGISTRIES.values(), TRANSFORMS, CALLBACKS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
