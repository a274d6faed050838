"""The `world_size` marker: one test function, run plainly in each rank of a gloo group."""

import inspect
from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import RankPool

settings.register_profile("patient", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("patient")

_pool = RankPool()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("world_size")
    if marker is not None:
        metafunc.parametrize(
            "world_size", marker.args, ids=[f"{size}-ranks" for size in marker.args]
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("world_size") is None:
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    kwargs = {name: pyfuncitem.funcargs[name] for name in names}
    module = pyfuncitem.module.__name__
    _pool.run(module, pyfuncitem.originalname, kwargs, pyfuncitem.callspec.params["world_size"])
    return True


@pytest.fixture(scope="session", autouse=True)
def _rank_pool() -> Iterator[None]:
    yield
    _pool.close()
