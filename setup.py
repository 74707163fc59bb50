"""Build both import packages; metadata lives in pyproject.toml.

`kernels/` is a source root, not a package: it holds `wantrain_kernels` and has no `__init__.py` of its own.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["wantrain", "wantrain.*"]), *find_packages("kernels")],
    package_dir={"wantrain_kernels": "kernels/wantrain_kernels"},
)
