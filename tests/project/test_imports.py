"""The layer needs torch and nothing else: every other package is out of reach in these processes."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.untraced
ONLY = """
import sys

class Only:
    def __init__(self, names):
        self.names = names | sys.stdlib_module_names | set(sys.builtin_module_names)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.names:
            raise ModuleNotFoundError(f"{name} is out of reach", name=name)

names = {"syncbn"} | set(sys.argv[1].split(","))
sys.meta_path.insert(0, Only(names))
"""

USE = """
import warnings
warnings.simplefilter("ignore")  # torch says that numpy is missing
import torch, syncbn

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
model = syncbn.convert_sync_batchnorm(model)
assert isinstance(model[1], syncbn.SyncBatchNorm)
model(torch.randn(8, 3)).sum().backward()
syncbn.recalibrate(model, [torch.randn(8, 3)])
assert type(syncbn.revert_sync_batchnorm(model)[1]) is torch.nn.BatchNorm1d
for name in syncbn.__all__:
    getattr(syncbn, name)
"""


def _python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _with_requirements(distribution: str, seen: set[str]) -> set[str]:
    """`distribution` and everything that pip would install with it."""
    if distribution in seen:
        return seen
    seen.add(distribution)
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _with_requirements(requirement.name.lower().replace("_", "-"), seen)
    return seen


def _modules_of_torch_alone() -> set[str]:
    installed = _with_requirements("torch", set())
    return {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if any(name.lower().replace("_", "-") in installed for name in distributions)
    }


def test_the_layer_works_with_torch_alone_installed() -> None:
    allowed = _modules_of_torch_alone()
    assert "torch" in allowed
    assert not allowed & {"numpy", "ray", "mlflow", "hydra", "torchvision"}
    _python(ONLY + USE, ",".join(allowed))


@pytest.mark.parametrize("module", ["numpy", "ray", "mlflow", "hydra"])
def test_packages_that_torch_does_not_need_are_out_of_reach_in_these_processes(module: str) -> None:
    with pytest.raises(AssertionError, match="out of reach"):
        _python(f"{ONLY}\nimport {module}", ",".join(_modules_of_torch_alone()))


def test_importing_the_package_waits_for_nothing() -> None:
    loaded = json.loads(_python("import syncbn, sys, json; print(json.dumps([*sys.modules]))"))
    assert "torch" not in loaded


def test_importing_the_layer_loads_nothing_of_torch_that_torch_has_not_loaded_itself() -> None:
    code = """
import json, sys, torch
before = {*sys.modules}
import syncbn
syncbn.SyncBatchNorm
print(json.dumps([*{*sys.modules} - before]))
"""
    packages = {name.partition(".")[0] for name in json.loads(_python(code))}
    assert packages - sys.stdlib_module_names == {"syncbn"}
