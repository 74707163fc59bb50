"""Build both import packages; metadata lives in pyproject.toml.

`kernels/` is a source root, not a package: it holds `wantrain_kernels` and has no `__init__.py` of its own. `configs/`
and `benchmarks/` lie beside the package in a checkout and inside it in a wheel: `wantrain/resources.py` finds them.

With WANTRAIN_CUDA=1, nvcc compiles `kernels/csrc` to a library for `wantrain_kernels/cuda_ops.py`, which needs neither
torch nor a GPU. WANTRAIN_CUDA_ARCHITECTURES ("80 90": A100, H100 and all later ones) chooses; 80 is the least.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CUDA_SOURCES = Path("kernels", "csrc")


class BuildWithFolders(build_py):
    """Build the packages, and put the shipped configurations and benchmarks inside, without their results."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "benchmarks"):
                target = Path(self.build_lib, "wantrain", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(folder, target, ignore=shutil.ignore_patterns("results", "__pycache__"))


class BuildWithNvcc(build_ext):
    """Build the CUDA kernels: a plain library, found as `_cuda` but no module to import."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")
        if nvcc is None:
            raise SystemExit("WANTRAIN_CUDA=1 needs nvcc (not on PATH, not in CUDA_HOME); install the CUDA toolkit")
        target, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp, "csrc")
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda source: compile_cuda(nvcc, Path(source), objects), ext.sources))
        subprocess.run([nvcc, "-shared", "-o", target, *made], check=True)


def compile_cuda(nvcc: str, source: Path, folder: Path) -> Path:
    """Compile one source; return its object file."""
    listed = os.environ.get("WANTRAIN_CUDA_ARCHITECTURES", "80 90").split()
    codes = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in listed]
    codes.append(f"-gencode=arch=compute_{listed[-1]},code=compute_{listed[-1]}")
    made = folder / f"{source.stem}.o"
    flags = ["--options-file", CUDA_SOURCES / "nvcc.flags", *codes, "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *flags, "-c", source, "-o", made], check=True)
    return made


def extensions() -> list[Extension]:
    """Return what is to be compiled: nothing, unless asked."""
    if os.environ.get("WANTRAIN_CUDA") != "1":
        return []
    sources = sorted(str(source) for source in CUDA_SOURCES.glob("*.c*") if source.suffix in (".cu", ".cpp"))
    return [Extension("wantrain_kernels._cuda", sources)]


setup(
    packages=[*find_packages(include=["wantrain", "wantrain.*"]), *find_packages("kernels")],
    package_dir={"wantrain_kernels": "kernels/wantrain_kernels"},
    package_data={"wantrain": ["py.typed"], "wantrain_kernels": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_py": BuildWithFolders, "build_ext": BuildWithNvcc},
)
