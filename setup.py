"""Build both import packages; metadata lives in pyproject.toml.

`kernels/` is a source root, not a package: it holds `wantrain_kernels` and has no `__init__.py` of its own. `configs/`
lies beside the package in a checkout and inside it in a wheel, where `wantrain/resources.py` finds it.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the packages, and put the shipped configurations inside."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "wantrain", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("configs", target)


setup(
    packages=[*find_packages(include=["wantrain", "wantrain.*"]), *find_packages("kernels")],
    package_dir={"wantrain_kernels": "kernels/wantrain_kernels"},
    package_data={"wantrain": ["py.typed"], "wantrain_kernels": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigs},
)
