"""NVTX ranges for Nsight Systems: one per stage of each layer, and one per mechanism. Off, they cost nothing.

    with profiling.ranges():
        model.generate(...)

A decode step isn't replayed from a CUDA graph while ranges are on: a graph's launches belong to no range.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

DOMAIN = "quicksilver"
T = TypeVar("T")
_nvtx: Any = None


def enabled() -> bool:
    return _nvtx is not None


@contextmanager
def ranges() -> Iterator[None]:
    """Names what runs inside for a profiler. ImportError, saying what to install, without the package ``nvtx``."""
    global _nvtx
    try:
        import nvtx
    except ImportError:
        raise ImportError("NVTX ranges need the package nvtx: pip install nvtx") from None
    before, _nvtx = _nvtx, nvtx
    try:
        yield
    finally:
        _nvtx = before


def span(name: str) -> AbstractContextManager[Any]:
    """A range called ``name``, where they are on."""
    return nullcontext() if _nvtx is None else _nvtx.annotate(name, domain=DOMAIN)


def ranged(calls: T, layer: int | None = None) -> T:
    """``calls``, with a range around every call of its methods where ranges are on; itself where not. A range is named
    after the method, and the layer: ``layer``, or the method's first argument if that is a number."""
    return calls if _nvtx is None else _Ranged(calls, layer)  # type: ignore[return-value]


class _Ranged:
    def __init__(self, calls: Any, layer: int | None) -> None:
        self._calls, self._layer = calls, layer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._calls, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            layer = args[0] if self._layer is None and args and type(args[0]) is int else self._layer
            with span(name if layer is None else f"layer {layer} {name}"):
                return value(*args, **kwargs)

        return call
