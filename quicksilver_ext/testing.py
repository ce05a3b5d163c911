"""For tests, here and elsewhere: the backends that can run, running on one of them, comparing results."""

from .kernels.testing import assert_close, assert_equal, backends, use_backend

__all__ = ["assert_close", "assert_equal", "backends", "use_backend"]
