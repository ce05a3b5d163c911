"""Matryoshka weights: see :mod:`quicksilver_ext.weights.matryoshka`, whose names these are."""

from .weights.matryoshka import GROUP_SIZES, MatryoshkaWeight, empty, pack_matryoshka, pack_plane, unpack_plane

__all__ = ["GROUP_SIZES", "MatryoshkaWeight", "empty", "pack_matryoshka", "pack_plane", "unpack_plane"]
