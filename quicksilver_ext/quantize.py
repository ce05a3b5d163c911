"""Matryoshka weights: names of :mod:`quicksilver_ext.weights.matryoshka` and
:mod:`quicksilver_ext.calibration.optimize`."""

from .calibration.optimize import Settings, optimize
from .weights.matryoshka import GROUP_SIZES, MatryoshkaWeight, empty, pack_matryoshka, pack_plane, unpack_plane

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
