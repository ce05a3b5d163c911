"""Adaptive Matryoshka Quantization of weights: INT8 codes whose top four bits are the INT4 codes.

Per row and group of ``group_size`` values along K, with w_max the group's element of largest magnitude with its sign
(the positive one where both signs reach it):

    scale = fp16(-w_max / 128)      q = clamp(round(w / scale), -128, 119)      u = q + 136  (8..255)
    INT8 value: scale * (u - 136)   INT4 value: scale * (16 * (u >> 4) - 128)

The scale has a sign so that w_max itself lands on -128, the one code without a positive twin: the grid loses nothing
to it, and the INT4 slice keeps both a zero and its full range. Quantization uses the scale as it is stored.

A weight that was quantized to 4 bits elsewhere (`pack_four_bits`) keeps its codes q, 0..15, as the high nibbles, its
scales and its offsets, and so its values: scale * q + offset. Its low nibbles, if wanted, are all 8, adding nothing.

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
ZERO_CODE = 136
LOW_NIBBLES = 0x0F0F0F0F
PACKABLE = (torch.float32, torch.float16, torch.bfloat16)  # what ops.matryoshka_pack reads
# Rounding a scale to fp16 moves it by up to 2^-25, and so a value by up to 128 times that: 1% of this magnitude.
SMALLEST_PEAK = 100 * 128 * 2.0**-25
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

    hi, lo  uint8 [N, ceil(K / 8) * 4], the high and low nibbles of the codes; lo is None where only INT4 is kept
    scale   fp16 [N, ceil(K / group_size)]
    offset  of the same kind as scale, or None: see above
    All contiguous, in panel order.
    """

    hi: Tensor
    lo: Tensor | None
    scale: Tensor
    in_features: int
    group_size: int
    offset: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.hi.shape[0]

    @property
    def nbytes(self) -> int:
        return self.hi.nbytes + self.group_nbytes + (0 if self.lo is None else self.lo.nbytes)

    @property
    def group_nbytes(self) -> int:
        """Of what groups have beside their codes."""
        return self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def rows(self, part: slice) -> MatryoshkaWeight:
        """A view of some rows: of whole panels of 16, so that it is one piece of each plane too."""
        lo, offset = (None if tensor is None else tensor[part] for tensor in (self.lo, self.offset))
        return replace(self, hi=self.hi[part], lo=lo, scale=self.scale[part], offset=offset)

    def codes(self) -> Tensor:
        """uint8 [N, K] codes u in row order. Without a low plane, the codes in the middle of each INT4 step (lo = 8):
        those have INT4's values."""
        high = unpack_plane(self.hi, self.in_features) << 4
        return high | (8 if self.lo is None else unpack_plane(self.lo, self.in_features))

    def dequantize(self, bits: int = 8) -> Tensor:
        """fp32 [N, K], the values that a GEMM with ``bits`` (8 or 4) multiplies by.

        Raises ValueError for other bits, and for 8 where there is no low plane.
        """
        if bits not in (4, 8):
            raise ValueError(f"bits: got {bits!r}, wanted 8 or 4")
        if bits == 8 and self.lo is None:
            raise ValueError("bits: got 8, but this weight was packed with its high plane only, so wanted 4")
        codes = self.codes()
        if bits == 4:
            codes = codes & 0xF0 | 8
        values = codes.to(torch.float32).sub_(ZERO_CODE)
        if self.offset is not None:
            values.add_(128).div_(16)
            return values.mul_(self._by_value(self.scale)).add_(self._by_value(self.offset))
        return values.mul_(self._by_value(self.scale))

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
    with_offset: bool = False,
) -> MatryoshkaWeight:
    """A packed weight whose planes are not filled yet, from ``allocate(shape, dtype=...)``."""
    plane, groups = plane_shape(out_features, in_features), scale_shape(out_features, in_features, group_size)
    return MatryoshkaWeight(
        hi=allocate(plane, dtype=torch.uint8),
        lo=allocate(plane, dtype=torch.uint8) if keep_low else None,
        scale=allocate(groups, dtype=torch.float16),
        in_features=in_features,
        group_size=group_size,
        offset=allocate(groups, dtype=torch.float16) if with_offset else None,
    )


def pack_matryoshka(
    weight: Tensor,
    group_size: int = 64,
    keep_low: bool = True,
    *,
    name: str = "weight",
    out: MatryoshkaWeight | None = None,
    part: bool = False,
) -> MatryoshkaWeight:
    """Quantizes and packs ``weight`` [N, K], of any floating dtype and any strides.

    Beside the result it needs a few MiB at most. ``out`` takes the planes to fill (from `empty`), which hold no weights
    after an error; ``name`` is what errors call the tensor.

    Scales are fp16, whose rounding costs any value up to 3.8e-6 beside its code's: a group whose magnitudes are all
    below that becomes zeros. Where some values of the matrix are a hundred times larger, that is no loss (a dead
    channel of 1e-9 in an ordinary matrix). Where none is, a norm may bring them all back up, so it's an error; a matrix
    of zeros is none. With ``part``, ``weight`` is some rows of a matrix, which the caller judges as a whole by `peak`
    and `check_peak`.

    Raises TypeError for a weight that isn't a floating-point tensor; ValueError for a wrong shape or group size, for
    NaN or Inf, for values beyond what an fp16 scale can reach (128 * 65504), and for a matrix whose magnitudes, zeros
    apart, are all below 3.8e-4.
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
        ops.matryoshka_pack(chunk, target.hi, target.lo, target.scale)
    if out.scale.isnan().any():
        top = weight.to(torch.float32).abs().max().item()
        if not math.isfinite(top):
            raise ValueError(f"{name}: holds NaN or Inf")
        raise ValueError(
            f"{name}: holds a value of magnitude {top:.3g}, beyond what an fp16 group scale can represent (8.38e6)"
        )
    if not part:
        check_peak(name, peak(weight, out))
    return out


def pack_four_bits(
    codes: Tensor, scale: Tensor, offset: Tensor, out: MatryoshkaWeight, *, name: str = "weight"
) -> None:
    """Packs rows of a weight that was quantized to 4 bits elsewhere, as they are, into ``out`` (from `empty`, with
    offsets): codes uint8 [N, K], 0..15; scale, offset fp16 [N, ceil(K / group_size)]; a value is scale * code + offset.

    Raises ValueError for scales and offsets that hold NaN or Inf.
    """
    assert out.offset is not None
    for what, values in (("scales", scale), ("offsets", offset)):
        if not values.isfinite().all():
            raise ValueError(f"{name}: its {what} hold NaN, Inf or a value beyond fp16's range")
    out.hi.copy_(pack_plane(codes))
    if out.lo is not None:
        out.lo.fill_(0x88)
    _into_panels(scale, out.scale)
    _into_panels(offset, out.offset)


def peak(weight: Tensor, packed: MatryoshkaWeight) -> float:
    """The largest magnitude of a weight that was packed; from SMALLEST_PEAK on only to a few percent."""
    of_scales = 128 * packed.scale.float().abs().max().item()
    return of_scales if of_scales >= SMALLEST_PEAK else weight.abs().max().item()


def check_peak(name: str, value: float) -> None:
    """ValueError for a matrix whose largest magnitude is one that fp16 scales hold too coarsely."""
    if 0 < value < SMALLEST_PEAK:
        raise ValueError(
            f"{name}: its magnitudes, {value:.3g} at most, are too small for the fp16 scales of packed weights "
            f"({SMALLEST_PEAK:.2g} and above): use precision bf16 or fp32, or weights that are scaled up"
        )


def pack_plane(nibbles: Tensor) -> Tensor:
    """uint8 [N, K] nibbles (0..15) in row order -> plane [N, ceil(K / 8) * 4] in panel order, the pad being 8.

    8 is the nibble of the zero code in both planes (136 = 0x88).
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
