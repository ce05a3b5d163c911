"""Adaptive Matryoshka Quantization of weights: a 4-bit code, and a residual that makes 8 bits of it.

Per row and group of ``group_size`` values along K there are a scale s and an offset z, both fp16, and per value two
nibbles, the code hi and the residual lo:

    INT4 value: s * hi + z      INT8 value: s * (hi + (lo - 8) / 8) + z

The residual reaches a whole step down and 7/8 of one up. So it overlaps with the neighbouring codes, and hi may be
chosen for 4 bits alone, by any quantizer, while the INT8 value is still that of the grid s / 8 which is nearest to the
weight. A weight that was quantized to 4 bits elsewhere keeps its codes, scales and offsets (`pack_codes`), and so
its values; it has no residuals.

Planes are stored in panels of 16 rows, as ``csrc/include/quicksilver/matryoshka.h`` says, because that is the order in
which the kernels stream them; tensors here have the logical shape and that storage order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import ops

GROUP_SIZES = (32, 64, 128)
PANEL_ROWS = 16
LINE = 8  # values of one row in a line of a panel: 4 bytes
LOW_NIBBLES = 0x0F0F0F0F
STORED = ("hi", "lo", "scale", "offset")  # what a packed weight is made of, by field
PACKABLE = (torch.float32, torch.float16, torch.bfloat16)  # what ops.matryoshka_pack reads
# Rounding scale and offset to fp16 moves them by up to 2^-25, and so a value by up to 16 times that: 1% of this.
SMALLEST_PEAK = 100 * 16 * 2.0**-25
LARGEST = 65504.0  # of fp16
CHUNK_VALUES = 1 << 20  # of other weights, a copy of so many values at once is made for it


def check_group_size(group_size: int) -> None:
    """ValueError for one that no kernel has."""
    if isinstance(group_size, bool | float) or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size!r}, wanted one of {', '.join(map(str, GROUP_SIZES))}")


def plane_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Shape of a uint8 plane of nibbles: half a byte per value, K padded to a multiple of 8."""
    return out_features, -(-in_features // LINE) * (LINE // 2)


def scale_shape(out_features: int, in_features: int, group_size: int) -> tuple[int, int]:
    """Shape of the fp16 scales: one per row and group."""
    return out_features, -(-in_features // group_size)


@dataclass(frozen=True)
class MatryoshkaWeight:
    """A packed weight matrix of ``out_features`` x ``in_features`` values.

    hi, lo  uint8 [N, ceil(K / 8) * 4], the nibbles; lo is None where only INT4 is kept
    scale, offset  fp16 [N, ceil(K / group_size)]
    All contiguous, in panel order.
    """

    hi: Tensor
    lo: Tensor | None
    scale: Tensor
    offset: Tensor
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        return self.hi.shape[0]

    @property
    def nbytes(self) -> int:
        return self.hi.nbytes + self.group_nbytes + (0 if self.lo is None else self.lo.nbytes)

    @property
    def group_nbytes(self) -> int:
        """Of what groups have beside their codes."""
        return self.scale.nbytes + self.offset.nbytes

    def rows(self, part: slice) -> MatryoshkaWeight:
        """A view of some rows: of whole panels of 16, so that it is one piece of each plane too."""
        lo = None if self.lo is None else self.lo[part]
        return replace(self, hi=self.hi[part], lo=lo, scale=self.scale[part], offset=self.offset[part])

    def dequantize(self, bits: int = 8) -> Tensor:
        """fp32 [N, K], the values that a GEMM with ``bits`` (8 or 4) multiplies by. Raises ValueError for other bits.
        A weight without a low plane has the same values at 8 bits as at 4."""
        if bits not in (4, 8):
            raise ValueError(f"bits: got {bits!r}, wanted 8 or 4")
        steps = unpack_plane(self.hi, self.in_features).to(torch.float32)
        if bits == 8 and self.lo is not None:
            steps.add_(unpack_plane(self.lo, self.in_features).to(torch.float32).sub_(8).div_(8))
        return steps.mul_(self._by_value(self.scale)).add_(self._by_value(self.offset))

    def matmul(self, x: Tensor, bits: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, see `ops.matryoshka_gemm`: x fp32 [T, K], bits int32 [T] (8 or 4; None: 8), bias fp32 [N] ->
        fp32 [T, N]."""
        return ops.matryoshka_gemm(x, self.hi, self.lo, self.scale, bits, bias, self.offset)

    def groups(self) -> tuple[Tensor, Tensor]:
        """Scales and offsets in row order, fp32 [N, G]."""
        return _from_panels(self.scale).float(), _from_panels(self.offset).float()

    def _by_value(self, of_groups: Tensor) -> Tensor:
        """fp32 [N, K] of scales or offsets."""
        values = _from_panels(of_groups).to(torch.float32)
        return values.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]


def empty(
    out_features: int,
    in_features: int,
    group_size: int = 64,
    keep_low: bool = True,
    allocate: Callable[..., Tensor] = torch.empty,
) -> MatryoshkaWeight:
    """A packed weight whose planes are not filled yet, from ``allocate(shape, dtype=...)``."""
    plane, groups = plane_shape(out_features, in_features), scale_shape(out_features, in_features, group_size)
    return MatryoshkaWeight(
        hi=allocate(plane, dtype=torch.uint8),
        lo=allocate(plane, dtype=torch.uint8) if keep_low else None,
        scale=allocate(groups, dtype=torch.float16),
        offset=allocate(groups, dtype=torch.float16),
        in_features=in_features,
        group_size=group_size,
    )


def pack_matryoshka(
    weight: Tensor,
    group_size: int = 64,
    keep_low: bool = True,
    importance: Tensor | None = None,
    *,
    name: str = "weight",
    out: MatryoshkaWeight | None = None,
    part: bool = False,
) -> MatryoshkaWeight:
    """Quantizes and packs ``weight`` [N, K], of any floating dtype and any strides.

    ``importance`` fp32 [K], above 0, is what a squared error in a column weighs when scales and offsets are chosen: the
    mean square of what the column is multiplied by. None: the same for all.

    Beside the result it needs a few MiB at most. ``out`` takes the planes to fill (from `empty`), which hold no weights
    after an error; ``name`` is what errors call the tensor.

    Scales and offsets are fp16, whose rounding costs any value up to 4.8e-7 beside its code's. Where some values of the
    matrix are a hundred times larger, that is no loss (a dead channel of 1e-9 in an ordinary matrix). Where none is, a
    norm may bring them all back up, so it's an error; a matrix of zeros is none. With ``part``, ``weight`` is some rows
    of a matrix, which the caller judges as a whole by `peak` and `check_peak`.

    Raises TypeError for a weight that isn't a floating-point tensor; ValueError for a wrong shape or group size, for
    NaN or Inf, for values beyond fp16's range (65504), and for a matrix whose magnitudes, zeros apart, are all below
    4.8e-5.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: got {got}, wanted a floating-point tensor")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name}: got shape {list(weight.shape)}, wanted [N, K] with at least one row and column")
    check_group_size(group_size)
    rows, columns = weight.shape
    if out is None:
        out = empty(rows, columns, group_size, keep_low)
    elif (out.out_features, out.in_features, out.group_size) != (rows, columns, group_size):
        raise ValueError(
            f"out: is for [{out.out_features}, {out.in_features}] in groups of {out.group_size}, "
            f"but {name} is [{rows}, {columns}] and group_size {group_size}"
        )

    direct = weight.dtype in PACKABLE and weight.is_contiguous()
    step = rows if direct else max(PANEL_ROWS, CHUNK_VALUES // columns // PANEL_ROWS * PANEL_ROWS)
    for start in range(0, rows, step):
        span = slice(start, start + step)
        chunk = weight[span] if direct else weight[span].to(torch.float32).contiguous()
        target = out.rows(span)
        ops.matryoshka_pack(chunk, target.hi, target.lo, target.scale, target.offset, importance)
    if out.scale.isnan().any():
        top = weight.to(torch.float32).abs().max().item()
        if not math.isfinite(top):
            raise ValueError(f"{name}: holds NaN or Inf")
        raise ValueError(
            f"{name}: holds a value of magnitude {top:.3g}, beyond fp16's range (65504), in which packed "
            "weights have their offsets: use precision bf16 or fp32"
        )
    if not part:
        check_peak(name, peak(weight, out))
    return out


def pack_codes(
    codes: Tensor,
    residuals: Tensor | None,
    scale: Tensor,
    offset: Tensor,
    out: MatryoshkaWeight,
    *,
    name: str = "weight",
) -> None:
    """Packs rows of a weight that was quantized elsewhere, as they are, into ``out`` (from `empty`): codes and
    residuals, if any, uint8 [N, K], 0..15; scale, offset fp16 [N, ceil(K / group_size)]. For values see above.

    Raises ValueError for scales and offsets that hold NaN or Inf.
    """
    for what, values in (("scales", scale), ("offsets", offset)):
        if not values.isfinite().all():
            raise ValueError(f"{name}: its {what} hold NaN, Inf or a value beyond fp16's range")
    out.hi.copy_(pack_plane(codes))
    if residuals is not None:
        assert out.lo is not None
        out.lo.copy_(pack_plane(residuals))
    _into_panels(scale, out.scale)
    _into_panels(offset, out.offset)


def peak(weight: Tensor, packed: MatryoshkaWeight) -> float:
    """The largest magnitude of a weight that was packed; well above SMALLEST_PEAK only to a few percent, as a grid
    may span more or less than its group."""
    offset = packed.offset.float()
    of_groups = torch.maximum(offset.abs(), offset + 15 * packed.scale.float()).max().item()
    return of_groups if of_groups >= 2 * SMALLEST_PEAK else weight.abs().max().item()


def check_peak(name: str, value: float) -> None:
    """ValueError for a matrix whose largest magnitude is one that fp16 scales hold too coarsely."""
    if 0 < value < SMALLEST_PEAK:
        raise ValueError(
            f"{name}: its magnitudes, {value:.3g} at most, are too small for the fp16 scales of packed weights "
            f"({SMALLEST_PEAK:.2g} and above): use precision bf16 or fp32, or weights that are scaled up"
        )


def pack_plane(nibbles: Tensor) -> Tensor:
    """uint8 [N, K] nibbles (0..15) in row order -> plane [N, ceil(K / 8) * 4] in panel order, the pad being 8.

    What is multiplied with the pad is zero, whatever it holds.
    """
    rows, columns = nibbles.shape
    plane = torch.empty(plane_shape(rows, columns), dtype=torch.uint8, device="cpu")
    padded = torch.full((rows, plane.shape[1] * 2), 8, dtype=torch.uint8, device="cpu")
    padded[:, :columns] = nibbles
    pairs = padded.view(torch.int32).view(rows, -1, 2)
    _into_panels(pairs[..., 0] | pairs[..., 1] << 4, _words(plane))
    return plane


def unpack_plane(plane: Tensor, in_features: int) -> Tensor:
    """Plane [N, ceil(K / 8) * 4] in panel order -> uint8 [N, K] nibbles in row order."""
    words = _from_panels(_words(plane))
    pairs = torch.stack((words & LOW_NIBBLES, words >> 4 & LOW_NIBBLES), dim=-1)
    return pairs.view(torch.uint8).view(plane.shape[0], -1)[:, :in_features].contiguous()


def _words(plane: Tensor) -> Tensor:
    """A plane as the int32 [N, ceil(K / 8)] words that panels are made of."""
    return plane.view(torch.int32)


def _panels(storage: Tensor) -> list[tuple[slice, Tensor]]:
    """The two parts of a matrix [N, columns] in panel order, as views that index [panel, row, column]: the rows of full
    panels and those of the last, shorter one."""
    rows, columns = storage.shape
    full = rows - rows % PANEL_ROWS
    flat = storage.view(-1)
    parts = []
    if full:
        view = flat[: full * columns].view(full // PANEL_ROWS, columns, PANEL_ROWS)
        parts.append((slice(0, full), view.transpose(1, 2)))
    if full < rows:
        view = flat[full * columns :].view(1, columns, rows - full)
        parts.append((slice(full, rows), view.transpose(1, 2)))
    return parts


def _into_panels(matrix: Tensor, storage: Tensor) -> None:
    """Stores a matrix [N, columns] in row order."""
    for rows, panels in _panels(storage):
        panels.copy_(matrix[rows].view(panels.shape))


def _from_panels(storage: Tensor) -> Tensor:
    """The matrix [N, columns] in row order of one in panel order."""
    matrix = torch.empty_like(storage)
    for rows, panels in _panels(storage):
        matrix[rows].view(panels.shape).copy_(panels)
    return matrix
