"""The one block of memory that holds all packed planes of a model."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from .matryoshka import MatryoshkaWeight, empty

HUGE_PAGE = 2 << 20
PAGE = 4096
LINE = 64


class Arena:
    """Hands out views of one block, in order. Before `reserve` it only measures: it hands out meta tensors, and the
    same requests again, after it, get the memory.

    The block starts on a huge page's boundary and asks the kernel for huge pages, since decoding reads all of it for
    every token. Views start on a cache line. The two planes of a weight start an odd number of pages apart, so that
    reading both at once doesn't meet in the same cache sets.
    """

    def __init__(self) -> None:
        self._used = 0
        self._block: Tensor | None = None

    def reserve(self) -> None:
        """Makes the block, of the size that was asked for so far, and starts from its beginning."""
        # Private, since the kernel gives no huge pages to anonymous memory that could be shared.
        memory = mmap.mmap(-1, self._used + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages: slower, not wrong
                memory.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping alive, as each view of it does
        start = -block.data_ptr() % HUGE_PAGE
        self._block = block[start : start + self._used]
        self._used = 0

    def weight(self, out_features: int, in_features: int, group_size: int, keep_low: bool) -> MatryoshkaWeight:
        """An unfilled packed weight."""
        self._align(PAGE)
        first = self._used

        def allocate(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
            low_plane = dtype == torch.uint8 and self._used > first
            self._align(PAGE if low_plane else LINE)
            if low_plane and (self._used - first) // PAGE % 2 == 0:
                self._used += PAGE
            return self._allocate(shape, dtype)

        return empty(out_features, in_features, group_size, keep_low, allocate)

    def _allocate(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        start = self._used
        self._used += math.prod(shape) * dtype.itemsize
        if self._block is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._block[start : self._used].view(dtype).view(shape)

    def _align(self, alignment: int) -> None:
        self._used = -(-self._used // alignment) * alignment
