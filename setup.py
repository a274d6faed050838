"""The one step of the build that pyproject.toml cannot say: `conf/` of the checkout is `syncbn/conf/` in a wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Copies `conf/` into what is built; an editable install reads it where it stands."""

    def run(self) -> None:
        """Build the Python part of the package."""
        super().run()
        if not self.editable_mode:
            packaged = Path(self.build_lib) / "syncbn" / "conf"
            shutil.rmtree(packaged, ignore_errors=True)  # an earlier build's may hold more
            shutil.copytree("conf", packaged)


setup(cmdclass={"build_py": BuildWithConf})
