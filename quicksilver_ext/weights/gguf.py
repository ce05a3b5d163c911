"""Reads .gguf files, whole or split into parts: metadata, and one tensor at a time, dequantized to fp32.

The block formats come from the `gguf` package; a kernel takes the commonest, since numpy is slow at them. The package's
GGUFReader isn't used, because it makes a numpy array of every token of the vocabulary (seconds on a 49,152-token one)
and checks nothing against the file's size.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from ..kernels import ops
from . import four_bits

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)  # as llama.cpp names the parts of a split model
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Values dequantized at once: few enough that numpy's temporaries stay in the cache, and in memory that is at hand; or
# enough to share out among the threads.
NUMPY_VALUES = 1 << 16
KERNEL_VALUES = 1 << 20


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is in PyTorch's order (rows first)."""

    path: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int


class GgufFile:
    """``metadata`` (key -> number, bool, string or list of these) and ``tensors`` of a GGUF file, version 2 or 3; of
    all its parts, where it is one of a split model's.

    Raises ValueError saying what is wrong with the file, in opening it and in `read`; OSError where it can't be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        parts = _parts(path)
        for part in parts:
            try:
                metadata = self._open(part)
            except ValueError as error:
                raise ValueError(str(error) if part == path else f"has a part, {part.name}, that {error}") from error
            self.metadata = metadata | self.metadata  # that of the first part, which alone is complete
        count = self.metadata.get("split.count", 1)
        if count not in (0, 1, len(parts)):
            raise ValueError(
                f"is one of {count} parts, but its name doesn't say which; name them as llama.cpp does: "
                f"{path.stem}-00001-of-{count:05}.gguf and so on"
            )
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(parts) > 1 and total != len(self.tensors):
            raise ValueError(f"has parts with {len(self.tensors)} tensors in all, but should have {total}")

    def _open(self, path: Path) -> dict[str, Any]:
        """Adds the tensors of one file, and returns its metadata."""
        metadata: dict[str, Any] = {}
        with open(path, "rb") as file:
            header = _Header(file, path.stat().st_size)
            if header.bytes(4) != MAGIC:
                raise ValueError("is not a GGUF file")
            version = header.scalar("I")
            if version not in VERSIONS:
                raise ValueError(
                    f"is GGUF version {version}; only versions {VERSIONS[0]} and {VERSIONS[1]} can be read"
                )
            tensors, entries = header.count(), header.count()
            for _ in range(entries):
                key = header.string()
                metadata[key] = header.value(header.scalar("I"))
            infos = [self._tensor_info(header) for _ in range(tensors)]
            alignment = metadata.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or alignment <= 0:
                raise ValueError(f"has general.alignment {alignment!r}")
            start = -(-file.tell() // alignment) * alignment
            size = header.size
        for name, shape, kind, offset in infos:
            tensor = GgufTensor(path, shape, kind, start + offset)
            if tensor.offset + _nbytes(name, tensor) > size:
                raise ValueError(f"is truncated: tensor {name!r} reaches beyond the end of the file")
            if name in self.tensors:
                raise ValueError(f"has tensor {name!r} twice")
            self.tensors[name] = tensor
        return metadata

    @staticmethod
    def _tensor_info(header: _Header) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = header.string()
        dimensions = header.scalar("I")
        if dimensions > 4:
            raise ValueError(f"gives tensor {name!r} {dimensions} dimensions")
        shape = tuple(header.scalar("Q") for _ in range(dimensions))[::-1]
        code = header.scalar("I")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise ValueError(
                f"stores tensor {name!r} in GGML type {code}, which the installed gguf package doesn't know"
            ) from None
        return name, shape, kind, header.scalar("Q")

    def read(self, name: str) -> Tensor:
        """The tensor as fp32. Raises ValueError for a quantization type that the gguf package can't dequantize."""
        shape = self.tensors[name].shape
        values = _fp32(math.prod(shape[:-1]), shape[-1] if shape else 1)
        for _ in self.parts(name, values):
            pass
        return values.view(shape)

    def parts(self, name: str, values: Tensor | None = None) -> Iterator[Tensor]:
        """The tensor's rows as fp32, a number of them at a time: all but the last time a multiple of 16.

        Each part lies in ``values`` [rows, columns] where that is given. ValueError as of `read`.
        """
        tensor = self.tensors[name]
        columns = tensor.shape[-1] if tensor.shape else 1
        chunk = KERNEL_VALUES if tensor.type in ops.GGUF_BLOCKS else NUMPY_VALUES
        for rows, data in self._rows(name, chunk):
            part = _fp32(len(data), columns) if values is None else values[rows]
            try:
                _dequantize(data.reshape(-1), tensor.type, part)
            except NotImplementedError:  # the gguf package's
                raise ValueError(
                    f"stores tensor {name!r} in type {tensor.type.name}, which can't be dequantized"
                ) from None
            yield part

    def four_bits(self, name: str) -> Iterator[four_bits.Parts] | None:
        """The matrix's own codes, scales and offsets, by the same parts; None where it has none."""
        kind = self.tensors[name].type
        if kind not in four_bits.FORMATS:
            return None
        return (four_bits.parts_of(torch.from_numpy(data), kind) for _, data in self._rows(name, KERNEL_VALUES))

    def _rows(self, name: str, values: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The stored bytes [rows, bytes of a row] of about so many values at a time, and which rows they are: all but
        the last time a multiple of 16."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        columns = tensor.shape[-1] if tensor.shape else 1
        row_bytes = _nbytes(name, tensor) // max(rows, 1)
        step = max(16, values // max(columns, 1) // 16 * 16)
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            for start in range(0, rows if columns else 0, step):
                count = min(step, rows - start)
                data = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
                yield slice(start, start + count), data.reshape(count, row_bytes)


def _parts(path: Path) -> list[Path]:
    """All files of the model that ``path`` is one of, in order."""
    match = PART.fullmatch(path.name)
    count = int(match[3]) if match else 1
    if match is None or count < 2:
        return [path]
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"is one of {count} parts, and {', '.join(missing[:4])} isn't there; fetch all of them")
    return parts


def _fp32(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


def _dequantize(data: np.ndarray, kind: GGMLQuantizationType, out: Tensor) -> None:
    """Whole blocks, as bytes, to fp32: by our kernel where it knows them, else by the gguf package."""
    if kind in ops.GGUF_BLOCKS:
        count, size = ops.GGUF_BLOCKS[kind]
        ops.gguf_dequantize(torch.from_numpy(data).view(-1, size), int(kind), out.view(-1, count))
    else:
        # As one long row, which is the same blocks: of short rows the package takes only 16 at a time.
        out.copy_(torch.from_numpy(quants.dequantize(data.reshape(1, -1), kind)).view(out.shape))


def _nbytes(name: str, tensor: GgufTensor) -> int:
    values, size = GGML_QUANT_SIZES[tensor.type]
    columns = tensor.shape[-1] if tensor.shape else 1
    if columns % values:
        raise ValueError(
            f"gives tensor {name!r} rows of {columns} values, not a multiple of {tensor.type.name}'s {values}"
        )
    return math.prod(tensor.shape) // values * size


class _Header:
    """A cursor over the header that never reads, or makes room for, more than the file holds."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise ValueError("is truncated or damaged: its header reaches beyond the end of the file")
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        count: int = self.scalar("Q")
        if count > self.size:
            raise ValueError(f"is damaged: its header announces {count} entries, more than the file has bytes")
        return count

    def string(self) -> str:
        return self.bytes(int.from_bytes(self.bytes(8), "little")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.count()
            if kind in SCALARS:
                code = f"<{count}{SCALARS[kind]}"
                return list(struct.unpack(code, self.bytes(struct.calcsize(code))))
            if kind == STRING:
                return [self.string() for _ in range(count)]
        elif kind in SCALARS:
            return self.scalar(SCALARS[kind])
        raise ValueError(f"is damaged: its metadata has a value of unknown type {kind}")
