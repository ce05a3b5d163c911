"""From a checkpoint to a `Model`: weights go from disk into their final form one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import _C
from ..weights.arena import Arena
from ..weights.checkpoint import Checkpoint, open_checkpoint, resolve
from ..weights.matryoshka import GROUP_SIZES, MatryoshkaWeight, check_peak, one_thread, pack_matryoshka, peak
from ..weights.model import PRECISIONS, Linear, Model, Norm
from ..weights.packed import is_packed, load_packed
from . import gpt2, llama

ARCHITECTURES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama}
SMALLEST_HALF = 50 * 2.0**-24  # half a step of fp16's subnormal numbers is 1% of this


def load_model(source: str | Path, precision: str = "int8", group_size: int = 64) -> Model:
    """Loads a Hugging Face folder, hub id, .gguf file, "demo", or a folder that `save_packed` wrote.

    Beside the model itself it needs room for the largest tensor, as fp32 at most. The config and the names and shapes
    of all tensors are checked before the first weight is read.

    Raises ValueError for a wrong precision or group size, and CheckpointError, a ValueError too, for a source that is
    missing, damaged or of another architecture.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: got {group_size!r}, wanted one of {', '.join(map(str, GROUP_SIZES))}")
    path = resolve(source)
    if is_packed(path):
        return load_packed(path, precision, group_size)
    checkpoint = open_checkpoint(path)
    kind = checkpoint.config.get("model_type")
    architecture = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise checkpoint.error(f"its model_type is {kind!r}; GPT-2 ('gpt2') and Llama ('llama') models can be read")
    _C.set_threads(torch.get_num_threads())  # packing's own
    with one_thread():
        arena = Arena()
        architecture.load(checkpoint, Reader(checkpoint, precision, group_size, arena, device="meta"))
        arena.reserve()
        model: Model = architecture.load(checkpoint, Reader(checkpoint, precision, group_size, arena))
        return model


class Reader:
    """Takes a model's parts from a checkpoint, in the precision asked for.

    On the device "meta" it is a rehearsal: names and shapes are checked and the arena measures, but nothing is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, precision: str, group_size: int, arena: Arena, device: str = "cpu"
    ) -> None:
        self.checkpoint, self.arena, self.device = checkpoint, arena, device
        self.precision, self.group_size = precision, group_size
        self.dense = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
        self._last: tuple[str, Tensor | None] = ("", None)

    def embedding(self, name: str, rows: int, columns: int) -> Tensor:
        return self._convert(name, self._fetch(name, (rows, columns)), self.dense or torch.float16)

    def table(self, name: str, rows: int, columns: int) -> Tensor:
        return self._convert(name, self._fetch(name, (rows, columns)), torch.float32)

    def norm(self, kind: str, name: str, size: int, eps: float) -> Norm:
        bias = self._vector(f"{name}.bias", size) if kind == "layer" else None
        return Norm(kind, self._vector(f"{name}.weight", size), bias, eps)

    def linear(self, name: str, out_features: int, in_features: int, bias: bool) -> Linear:
        """``name``.weight [out, in], and ``name``.bias where the model has biases."""
        weight = self._matrix(f"{name}.weight", out_features, in_features)
        return Linear(weight, self._vector(f"{name}.bias", out_features) if bias else None)

    def conv1d(self, name: str, out_features: int, in_features: int, part: int = 0, parts: int = 1) -> Linear:
        """One of ``parts`` equal parts of the outputs of GPT-2's transposed ``name``.weight [in, parts * out]."""
        rows = slice(part * out_features, (part + 1) * out_features)
        weight = self._fetch(f"{name}.weight", (in_features, parts * out_features)).t()[rows]
        bias = self._vector(f"{name}.bias", parts * out_features)
        return Linear(self._pack(f"{name}.weight", (out_features, in_features), [weight]), bias[rows].clone())

    def head(self, name: str, embedding: Tensor, tied: bool) -> Linear:
        """The output matrix, of its own or, where tied, the embedding's; packed with both planes at any precision."""
        if tied and self.dense:
            return Linear(embedding)
        rows, columns = embedding.shape
        return Linear(self._matrix(name, rows, columns, keep_low=True))

    def _matrix(self, name: str, rows: int, columns: int, keep_low: bool | None = None) -> MatryoshkaWeight | Tensor:
        parts: Iterable[Tensor]
        if self.dense or self.device == "meta" or name == self._last[0]:
            parts = [self._fetch(name, (rows, columns))]
        else:  # by blocks of rows: as fp32, a matrix of Llama-2-7B is as large as all planes of its layer
            self._check(name, (rows, columns))
            parts = self.checkpoint.parts(name)
        return self._pack(name, (rows, columns), parts, keep_low)

    def _pack(
        self, name: str, shape: tuple[int, int], parts: Iterable[Tensor], keep_low: bool | None = None
    ) -> MatryoshkaWeight | Tensor:
        """A matrix, given by blocks of rows; where it stays dense, as a whole."""
        if self.dense:
            (whole,) = parts
            return self._convert(name, whole, self.dense)
        keep_low = self.precision != "int4" if keep_low is None else keep_low
        packed = self.arena.weight(*shape, self.group_size, keep_low)
        if self.device == "meta":
            return packed
        start, largest = 0, 0.0
        for part in parts:
            rows = packed.rows(slice(start, start + len(part)))
            try:
                pack_matryoshka(part, self.group_size, name=name, out=rows, part=True)
            except ValueError as error:
                raise self.checkpoint.error(f"tensor {error}") from error
            start, largest = start + len(part), max(largest, peak(part, rows))
        try:
            check_peak(name, largest)
        except ValueError as error:
            raise self.checkpoint.error(f"tensor {error}") from error
        return packed

    def _vector(self, name: str, size: int) -> Tensor:
        return self._convert(name, self._fetch(name, (size,)), torch.float32)

    def _convert(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy, which doesn't hold on to the file."""
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if self.device == "meta":
            return copy
        low, high = (bound.item() for bound in copy.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise self.checkpoint.error(f"tensor {name} holds NaN, Inf or a value beyond {dtype}'s range")
        if dtype == torch.float16 and max(-low, high) < SMALLEST_HALF and tensor.any():
            largest = tensor.abs().max().item()
            raise self.checkpoint.error(
                f"tensor {name}: its magnitudes, {largest:.3g} at most, are too small for fp16, in which packed "
                "precisions hold it: use precision bf16 or fp32, or weights that are scaled up"
            )
        return copy

    def _fetch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as it is stored. The last one is kept, since several parts in a row may come from it."""
        last, tensor = self._last
        if name == last and tensor is not None:
            return tensor
        del tensor
        self._last = ("", None)  # lets go of it before the next one is read
        self._check(name, shape)
        tensor = torch.empty(shape, device="meta") if self.device == "meta" else self.checkpoint.tensor(name)
        self._last = (name, tensor)
        return tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            found = self.checkpoint.shape(name)
        except KeyError:
            raise self.checkpoint.error(
                f"has no tensor {name}; it is incomplete, or its config describes another model"
            ) from None
        if found != shape:
            raise self.checkpoint.error(
                f"tensor {name} has shape {list(found)}, but the config makes it {list(shape)}; "
                "one of the two belongs to another model"
            )
