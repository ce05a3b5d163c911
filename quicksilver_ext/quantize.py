"""Matryoshka weights: names of :mod:`quicksilver_ext.weights.matryoshka` and
:mod:`quicksilver_ext.calibration.optimize`. The latter needs the whole engine, so it is loaded when it is first asked
for."""

from typing import TYPE_CHECKING, Any

from .weights.matryoshka import GROUP_SIZES, MatryoshkaWeight, empty, pack_matryoshka, pack_plane, unpack_plane

if TYPE_CHECKING:
    from .calibration.optimize import Settings, optimize

__all__ = [
    "GROUP_SIZES",
    "MatryoshkaWeight",
    "Settings",
    "empty",
    "optimize",
    "pack_matryoshka",
    "pack_plane",
    "unpack_plane",
]


def __getattr__(name: str) -> Any:
    if name in ("Settings", "optimize"):
        from .calibration import optimize as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
