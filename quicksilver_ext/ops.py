"""QuickSilver's operators: see :mod:`quicksilver_ext.kernels.ops`, whose names these are."""

from .kernels.ops import *  # noqa: F403
from .kernels.ops import __all__ as __all__
