"""What the build promises: the rules of the sources, of the objects, and of those who link the C++ library."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
ISAS = ("baseline", "avx2", "avx512", "avx512vnni")


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The C++ library alone, built and installed: (build folder, prefix). Needs neither torch nor Python."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to build the library")
    build, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    options = ("-DQUICKSILVER_WERROR=ON", "-DQUICKSILVER_TESTS=ON", "-DQUICKSILVER_CUDA=0", "-DQUICKSILVER_EMULATOR=1")
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options)
    run("cmake", "--build", build)
    run("cmake", "--install", build, "--prefix", prefix)
    return build, prefix


@pytest.mark.slow
def test_cpp_example_links_the_installed_library(library, tmp_path):
    _, prefix = library
    example = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "cpp", example)
    run("cmake", "-G", "Ninja", "-S", example, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "build")
    from quicksilver_ext import _C

    for isa in _C.supported_isas():
        out = run(tmp_path / "build" / "gemm", env={**os.environ, "QUICKSILVER_ISA": isa})
        assert out.startswith(f"{isa}, "), out
    done = subprocess.run(
        [tmp_path / "build" / "gemm"], env={**os.environ, "QUICKSILVER_ISA": "mmx"}, capture_output=True
    )
    assert done.returncode != 0


@pytest.mark.slow
def test_kernels_against_their_definitions(library):
    """The C++ tests: every instruction set that this machine has, and AVX-512's kernels made of AVX2."""
    from quicksilver_ext import _C

    build, _ = library
    out = run(build / "quicksilver_tests")
    for isa in _C.supported_isas():
        assert f"{isa}: 0 failures" in out
    if (build / "quicksilver_emulated_tests").exists() and "avx2" in _C.supported_isas():
        out = run(build / "quicksilver_emulated_tests")
        for isa in ISAS:
            assert f"{isa}: 0 failures" in out


@pytest.mark.slow
def test_cuda_kernels_in_the_emulator(library):
    """The CUDA kernels against the CPU's, under the address and undefined-behaviour sanitizers, without a toolkit."""
    build, _ = library
    if not (build / "quicksilver_cuda_tests").exists():
        pytest.skip("the emulator runs on x86-64 Linux only")
    out = run(build / "quicksilver_cuda_tests")
    for suite in ("emulator", "mechanisms", "prefill", "decode", "attention", "limits"):
        assert f"{suite}: 0 failures" in out


@pytest.mark.slow
def test_the_installed_profiler_runs_and_checks_itself(library):
    _, prefix = library
    command = (prefix / "bin" / "quicksilver_profile", "mlp_output", "--shape", "demo", "--layers", "1", "--rows", "3")
    for backend in ("cpu", "emulated"):
        out = run(*command, "--backend", backend, "--repeat", "1", "--warmup", "0", "--json", "-")
        assert json.loads(out), backend


@pytest.mark.slow
def test_cuda_is_refused_in_one_line_where_there_is_no_compiler(tmp_path):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to configure")
    options = ("-DQUICKSILVER_CUDA=1", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "no CUDA compiler was found" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_kernel_objects_define_their_own_names_only(library):
    """An inline function of the standard library, compiled wide, could be the copy that the linker keeps for all."""
    if shutil.which("nm") is None:
        pytest.skip("nm is needed to read objects")
    build, _ = library
    for isa in ISAS:
        objects = sorted((build / "CMakeFiles" / f"quicksilver_{isa}.dir").rglob("*.o"))
        if not objects:
            continue
        defined = run("nm", "--demangle", "--defined-only", "--extern-only", *objects).splitlines()
        names = [line.split(maxsplit=2)[2] for line in defined if re.match(r"[0-9a-f]+ [A-Za-z] ", line)]
        assert names
        # A static of a function's own, such as a table of its lambda, is named after that function.
        strangers = [n for n in names if f"quicksilver::{isa}::" not in n and f"quicksilver::kernels_{isa}()" not in n]
        assert not strangers, (isa, strangers)


@pytest.mark.slow
def test_shared_objects_have_no_wide_instructions(library):
    if shutil.which("objdump") is None:
        pytest.skip("objdump is needed to read objects")
    build, _ = library
    objects = sorted((build / "CMakeFiles" / "quicksilver.dir").rglob("*.o"))
    objects += sorted((build / "CMakeFiles" / "quicksilver_baseline.dir").rglob("*.o"))
    assert objects
    assert not re.search(r"%[yz]mm", run("objdump", "--disassemble", "--no-show-raw-insn", *objects))


def test_installed_headers_compile_alone_and_as_one(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("a C++ compiler is needed")
    headers = sorted((ROOT / "csrc" / "include" / "quicksilver").glob("*.h"))
    assert headers
    lines = [f'#include "quicksilver/{header.name}"' for header in headers]
    for name, text in (*((h.stem, line) for h, line in zip(headers, lines)), ("all", "\n".join(lines))):
        source = tmp_path / f"{name}.cpp"
        source.write_text(text + "\n")
        run(
            compiler,
            "-std=c++20",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-I",
            ROOT / "csrc" / "include",
            source,
        )


def test_only_the_bindings_know_torch():
    for path in SOURCES:
        includes = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text())
        foreign = [i for i in includes if i.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h"))]
        if path.parent.name == "bindings":
            allowed = ("torch/csrc/stable/", "torch/headeronly/", "pybind11/")
            assert all(include.startswith(allowed) for include in foreign), path
        else:
            assert not foreign, f"{path} includes {foreign}"


def test_no_flag_is_wider_than_its_variant():
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "cmake").iterdir()]:
        text = path.read_text()
        assert "march=" not in text and "mcpu=" not in text, path
        if path.name != "Isa.cmake":
            assert "-mavx" not in text, path
    for path in SOURCES:
        assert "#pragma GCC target" not in path.read_text(), path


def test_files_are_short_enough_to_read():
    folders = ("csrc", "quicksilver_ext", "python_tests", "cmake", "examples", "tools", "benchmarks")
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".cmake")
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                lines = len(path.read_text().splitlines())
                assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_compiler_is_one_clear_line(tmp_path):
    pytest.importorskip("setuptools")
    environment = {**os.environ, "CXX": "no-such-compiler", "PATH": str(Path(sys.executable).parent)}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "no C++ compiler found (looked for no-such-compiler)" in last and "apt install g++" in last
    assert "Traceback" not in done.stderr


def test_versions_agree():
    import quicksilver_ext

    project = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cmake = re.search(r"project\(quicksilver VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert project and cmake
    assert project[1] == cmake[1] == quicksilver_ext.__version__
