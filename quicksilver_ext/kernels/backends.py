"""Which functions the operators run on: the compiled kernels of an instruction set, or a table registered in Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import fakes  # noqa: F401  (registers itself)

_CPU: dict[str, Callable[..., Any]] = {}
_tables: dict[str, Mapping[str, Callable[..., Any]]] = {}
_in_use = "cpu"


def current_backend() -> str:
    """Name of the backend that operators run on, for example "cpu-avx2"."""
    return f"cpu-{_C.isa()}" if _in_use == "cpu" else _in_use


def set_backend(name: str) -> None:
    """Makes all operators run on a backend. ValueError for one that isn't known or can't run on this machine."""
    global _in_use
    if name.startswith("cpu-"):
        _C.set_isa(name.removeprefix("cpu-"))
        _in_use = "cpu"
        return
    if name == "reference" and name not in _tables:
        import_module("quicksilver_ext.kernels.reference")  # registers itself
    if name not in _tables:
        known = ["reference", *(f"cpu-{isa}" for isa in _C.supported_isas()), *_tables]
        raise ValueError(f"backend: got {name!r}, wanted one of {', '.join(dict.fromkeys(known))}")
    _in_use = name


def register_python_backend(name: str, table: Mapping[str, Callable[..., Any]]) -> None:
    """Adds a backend: a function for each operator, with the signature of that in ``ops`` and checked arguments."""
    missing = sorted(_CPU.keys() - table.keys())
    if name.startswith("cpu") or missing:
        raise ValueError(
            f"table: backend {name!r} lacks {', '.join(missing)}" if missing else f"name: {name!r} is taken"
        )
    _tables[name] = table


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    return (_CPU if _in_use == "cpu" else _tables[_in_use])[name](*args, **kwargs)


def on_host(name: str, tensors: dict[str, Tensor | None]) -> Callable[..., None]:
    """An operator that weights go through on their way in: on the CPU whatever the backend, but for the reference."""
    for argument, tensor in tensors.items():
        if tensor is not None and not tensor.is_cpu:
            raise ValueError(f"{argument}: got a tensor on {tensor.device}, wanted one on the CPU")
    return _tables.get(_in_use, {}).get(name) or getattr(torch.ops.quicksilver, name).default


_NAMES = (
    "softmax_entropy",
    "kv_allocate",
    "kv_scatter",
    "kv_merge",
    "compacted_attention",
    "attention_lse",
    "fusion_groups",
    "fusion_reduce",
    "fusion_expand",
    "matryoshka_gemm",
    "quantize_rows",
)


def compiled(namespace: str) -> dict[str, Callable[..., Any]]:
    """The operators of torch.ops.<namespace>, with the signatures of the wrappers in ``ops``."""
    library = getattr(torch.ops, namespace)
    halting = library.halting_update.default

    def halting_update(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *tensors, params, overrides = args  # the schema has params' fields one by one
        return halting(*tensors, *params, overrides)

    return {name: getattr(library, name).default for name in _NAMES} | {"halting_update": halting_update}


_CPU.update(compiled("quicksilver"))  # and CUDA's, where tensors are there
if hasattr(_C, "emulated"):
    register_python_backend("cuda-emulated", compiled("quicksilver_emulated"))


# The compiled kernels' threads start anew in a forked child. PyTorch's are gone there, and it would wait for them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
