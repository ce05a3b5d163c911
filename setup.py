"""A thin driver over CMakeLists.txt: builds quicksilver_ext._C with CMake and Ninja. Metadata is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI_HEADER = "include/torch/csrc/stable/library.h"
# Of the build, from the environment; see cmake/Cuda.cmake.
OPTIONS = ("QUICKSILVER_CUDA", "QUICKSILVER_CUDA_ARCHITECTURES", "QUICKSILVER_EMULATOR")


def torch_root() -> Path | None:
    """The folder of the torch to build against: the one of the environment that we are installed into.

    Under build isolation pip hides that environment from `import`, but its headers are all that the build wants of it.
    """
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for folder in folders:
        root = Path(folder or ".").resolve() / "torch"
        if (root / STABLE_ABI_HEADER).is_file():
            return root
    return None


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compiler)):
        sys.exit(
            f"quicksilver: no C++ compiler found (looked for {', '.join(compiler)}). Install one: 'apt install g++' on "
            "Debian and Ubuntu, 'dnf install gcc-c++' on Fedora, 'xcode-select --install' on macOS; or set CXX."
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_compiler()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        ninja = shutil.which("ninja")
        if ninja is None:
            sys.exit("quicksilver: ninja not found. Install it: pip install ninja")
        root = torch_root()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            # Given anew each time: under build isolation they live in another temporary folder with every build.
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DQUICKSILVER_TORCH_ROOT={root or ''}",
            "-DQUICKSILVER_PYTHON=ON",
            *(f"-D{name}={os.environ.get(name, '')}" for name in OPTIONS),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C", "quicksilver_profile"], check=True)
        target.unlink(missing_ok=True)  # not written over: a running process may have it mapped
        install = ["cmake", "--install", str(build), "--component", "python", "--prefix", str(target.parent), "--strip"]
        subprocess.run(install, check=True)


setup(
    ext_modules=[Extension("quicksilver_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Asked for only where the environment has none: pip fetches it into the isolated build, and it can be gigabytes.
    setup_requires=[] if torch_root() else ["torch>=2.10"],
)
