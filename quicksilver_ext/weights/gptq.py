"""Folders whose matrices were quantized to 4 bits by GPTQ or AWQ: codes, scales and zero points, and no value changed.

In place of a matrix's weight [N, K] there are, with eight codes in an int32, the lowest bits first,

    qweight  GPTQ: [K / 8, N], a word for eight values along K; AWQ: [K, N / 8], eight along N, 0 2 4 6 1 3 5 7
    qzeros   [G, N / 8], zero points, packed along N; AWQ's in that order too
    scales   [G, N]
    g_idx    [K], GPTQ's: the group of each column; where it's missing, column k is of group k // group_size

and a value is scale * (code - zero). Modules that weren't quantized (``lm_head``, ``modules_to_not_convert``) have
their weight as it is, so the tensors say which are which.

GPTQ's first format stores zero points less one: each whole word less 0x11111111, so that a zero point of 0 borrows from
its neighbour. Adding that to whole words undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import FLOATS, CheckpointError, Fields, FolderCheckpoint
from .matryoshka import GROUP_SIZES

CODES = 8  # in a word
ONES = 0x11111111
LARGEST_GROUP = max(GROUP_SIZES)
LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}  # by method
CHUNK_VALUES = 1 << 20  # taken apart at once
# A scale in bf16 or fp32 that becomes fp16's moves by up to half a step of its subnormal numbers: 1% of this.
SMALLEST_SCALE = 50 * 2.0**-24


@dataclass(frozen=True)
class Scheme:
    """What a quantization_config says."""

    awq: bool
    group_size: int | None  # None: one group for the whole of K
    less_one: bool  # zero points are
    act_order: bool  # so g_idx must be there

    @property
    def run(self) -> int:
        """Columns in one of our groups: a larger group is repeated in ours."""
        return LARGEST_GROUP if self.group_size is None else min(self.group_size, LARGEST_GROUP)


def scheme_of(config: dict[str, Any], where: str) -> Scheme | None:
    """The scheme of a model's config; None where it isn't quantized. CheckpointError for one that can't be read."""
    values = config.get("quantization_config")
    if not values:
        return None
    where = f"{where}, quantization_config"
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: is a {type(values).__name__}, wanted an object")
    fields = Fields(values, where)
    method = fields.choice("quant_method", tuple(LAYOUTS))
    if values.get("bits") != 4:
        raise fields.error("bits", "4, the only width that can be read")
    # The layout's key has changed its name over the years.
    key = next((key for key in ("checkpoint_format", "format", "version") if values.get(key)), "checkpoint_format")
    if isinstance(layout := values.get(key), str):
        layout = layout.lower()
    layout = Fields({key: layout}, where).choice(key, LAYOUTS[method], default=LAYOUTS[method][0])
    if fields.flag("is_marlin_format", False):
        raise fields.error("is_marlin_format", "false: weights in the plain format")
    dynamic = values.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(key.startswith("-:") for key in dynamic):
        raise fields.error("dynamic", "no settings for single modules, but which of them are left out (-:)")
    size = values.get("group_size")
    fits = isinstance(size, int) and (size == -1 or size in GROUP_SIZES or (size > 0 and size % LARGEST_GROUP == 0))
    if not fits:
        raise fields.error("group_size", "32, 64, a multiple of 128, or -1, one group for a whole row")
    act_order = method == "gptq" and fields.flag("desc_act", False)
    return Scheme(method == "awq", None if size == -1 else size, layout == "gptq", act_order)


@dataclass(frozen=True)
class Matrix:
    """One that is stored quantized. ``stem``: what its tensors' names begin with; [rows, columns]: N and K."""

    stem: str
    rows: int
    columns: int
    of_runs: Tensor | None  # the group of each run of columns that makes one of ours; None where a run is of several


class QuantizedFolder(FolderCheckpoint):
    """A folder in GPTQ's or AWQ's format, under the names and the shapes that the weights had before.

    The codes are kept of matrices whose groups are runs of columns. Act-order (``desc_act``) mixes the columns of
    groups, and kernels multiply in the order of columns; there, and where a family has a matrix transposed, there are
    the values alone.
    """

    def __init__(self, folder: Path, transposes: Callable[[str], bool]):
        """``transposes``: whether the family has the matrix of this name as [in, out]."""
        super().__init__(folder)
        scheme = scheme_of(self.config, str(folder))
        assert scheme is not None
        self._scheme, self._transposes = scheme, transposes
        self.own_group = scheme.run
        stems = [name.removesuffix("qweight") for name in self._homes if name.endswith(".qweight")]
        self._matrices = {f"{stem}weight": self._matrix(stem) for stem in stems}
        parts = {f"{stem}{part}" for stem in stems for part in ("qweight", "qzeros", "scales", "g_idx")}
        self._names = [*self._matrices, *(name for name in self._homes if name not in parts)]
        self.without_codes = [name for name in self._matrices if self.four_bits(name) is None]

    def _matrix(self, stem: str) -> Matrix:
        """Checks all that can be known of a matrix without reading its codes and scales."""
        scheme, home = self._scheme, self._homes[f"{stem}qweight"]
        if f"{stem}weight" in self._homes:
            raise self.error(f"has both {stem}weight and {stem}qweight; one of the two is left over, so remove it")
        packed = home.shapes[f"{stem}qweight"]
        if len(packed) != 2 or 0 in packed:
            raise self._wrong(f"{stem}qweight", f"has shape {list(packed)}, wanted a matrix")
        columns, rows = (packed[0], packed[1] * CODES) if scheme.awq else (packed[0] * CODES, packed[1])
        groups = 1 if scheme.group_size is None else -(-columns // scheme.group_size)
        self._check_part(f"{stem}qweight", packed, ("I32",))
        self._check_part(f"{stem}scales", (groups, rows), FLOATS)
        self._check_part(f"{stem}qzeros", (groups, -(-rows // CODES)), ("I32",))
        of_columns = torch.arange(columns, dtype=torch.int64, device="cpu") // (scheme.group_size or columns)
        if not scheme.awq and (scheme.act_order or f"{stem}g_idx" in self._homes):
            self._check_part(f"{stem}g_idx", (columns,), ("I32", "I64"))
            of_columns = self._read(f"{stem}g_idx").long()
            if of_columns.min() < 0 or of_columns.max() >= groups:
                bad = of_columns.min() if of_columns.min() < 0 else of_columns.max()
                raise self._wrong(f"{stem}g_idx", f"names group {bad}, but there are {groups}")
        of_runs = of_columns[:: scheme.run].clone()
        whole = torch.equal(of_runs.repeat_interleave(scheme.run)[:columns], of_columns)
        return Matrix(stem, rows, columns, of_runs if whole else None)

    def _check_part(self, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
        home = self._homes.get(name)
        if home is None:
            raise self.error(f"has no tensor {name}, without which its matrix can't be read; fetch the file again")
        if home.shapes[name] != shape:
            raise self._wrong(
                name,
                f"has shape {list(home.shapes[name])}, but qweight and group_size {self._scheme.group_size or -1} make "
                f"it {list(shape)}",
            )
        if home.dtypes[name] not in types:
            raise self._wrong(name, f"is of type {home.dtypes[name]}, wanted {' or '.join(types)}")

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._homes[name].path}: tensor {name} {what}; the file is damaged or quantization_config is another's, "
            "so fetch both again"
        )

    def _read(self, name: str) -> Tensor:
        return self._homes[name].tensor(name)

    def names(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().shape(name)
        shape = (matrix.rows, matrix.columns)
        return shape[::-1] if self._transposes(name) else shape

    def tensor(self, name: str) -> Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return super().tensor(name)
        values = torch.empty(matrix.rows, matrix.columns, dtype=torch.float32, device="cpu")
        for rows, part in self._values(matrix):
            values[rows] = part
        return values.t() if self._transposes(name) else values

    def parts(self, name: str) -> Iterator[Tensor]:
        matrix = self._matrices.get(name)
        if matrix is None or self._transposes(name):
            yield self.tensor(name)
        else:
            yield from (part for _, part in self._values(matrix))

    def four_bits(self, name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]] | None:
        matrix = self._matrices.get(name)
        if matrix is None or matrix.of_runs is None or self._transposes(name):
            return None
        return self._four_bits(matrix, matrix.of_runs)

    def _four_bits(self, matrix: Matrix, of_runs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        scales, zeros = self._groups(matrix)
        if scales.dtype != torch.float16 and 0 < (largest := scales.abs().max().item()) < SMALLEST_SCALE:
            raise self.error(
                f"tensor {matrix.stem}scales: its magnitudes, {largest:.3g} at most, are too small for fp16, in which "
                "packed precisions hold them: use precision bf16 or fp32, or weights that are scaled up"
            )
        scales = scales[:, of_runs].half()
        offsets = (scales.float() * -zeros[:, of_runs].float()).half()  # of 11 bits and 4: the product itself is exact
        for rows, codes in self._codes(matrix):
            yield codes, scales[rows], offsets[rows]

    def _values(self, matrix: Matrix) -> Iterator[tuple[slice, Tensor]]:
        """fp32 [rows, K] of blocks of rows. Exact where scales are fp16 or bf16."""
        scales, zeros = self._groups(matrix)
        if matrix.of_runs is None:
            of_columns = self._read(f"{matrix.stem}g_idx").long()
        else:
            of_columns = matrix.of_runs.repeat_interleave(self._scheme.run)[: matrix.columns]
        for rows, codes in self._codes(matrix):
            steps = codes.float().sub_(zeros[rows].float()[:, of_columns])
            yield rows, steps.mul_(scales[rows].float()[:, of_columns])

    def _groups(self, matrix: Matrix) -> tuple[Tensor, Tensor]:
        """Scales, as they are stored, and zero points, uint8: [N, G]."""
        words = self._read(f"{matrix.stem}qzeros")
        zeros = self._along_rows(words + ONES if self._scheme.less_one else words)
        return self._read(f"{matrix.stem}scales").t(), zeros[: matrix.rows]

    def _codes(self, matrix: Matrix) -> Iterator[tuple[slice, Tensor]]:
        """uint8 [rows, K] of blocks of rows, all but the last of a multiple of 16."""
        words = self._read(f"{matrix.stem}qweight")
        step = max(16, CHUNK_VALUES // matrix.columns // 16 * 16)
        for start in range(0, matrix.rows, step):
            rows = slice(start, min(start + step, matrix.rows))
            if self._scheme.awq:
                yield rows, self._along_rows(words[:, rows.start // CODES : rows.stop // CODES])
            else:
                yield rows, _nibbles(words[:, rows].t())

    def _along_rows(self, words: Tensor) -> Tensor:
        """uint8 [8 * n, L] of words [L, n] that were packed along the matrix's rows."""
        nibbles = _nibbles(words)
        if self._scheme.awq:  # of each word, the even values and then the odd ones
            return nibbles.view(len(words), -1, 2, CODES // 2).permute(1, 3, 2, 0).reshape(-1, len(words))
        return nibbles.t().contiguous()


def _nibbles(words: Tensor) -> Tensor:
    """uint8 [L, 8 * n], 0..15, of int32 [L, n]: the lowest bits first."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
