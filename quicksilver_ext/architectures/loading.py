"""From a checkpoint to a `Model`: weights go from disk into their final form one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import _C
from ..checkpoint import Checkpoint, open_checkpoint, resolve
from ..quantize import GROUP_SIZES, MatryoshkaWeight, one_thread, pack_matryoshka
from . import gpt2, llama
from .arena import Arena
from .model import PRECISIONS, Linear, Model, Norm
from .packed import is_packed, load_packed

ARCHITECTURES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama}


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
        weight = self._fetch(f"{name}.weight", (out_features, in_features))
        return Linear(
            self._pack(f"{name}.weight", weight), self._vector(f"{name}.bias", out_features) if bias else None
        )

    def conv1d(self, name: str, out_features: int, in_features: int, part: int = 0, parts: int = 1) -> Linear:
        """One of ``parts`` equal parts of the outputs of GPT-2's transposed ``name``.weight [in, parts * out]."""
        rows = slice(part * out_features, (part + 1) * out_features)
        weight = self._fetch(f"{name}.weight", (in_features, parts * out_features))
        bias = self._vector(f"{name}.bias", parts * out_features)
        return Linear(self._pack(f"{name}.weight", weight.t()[rows]), bias[rows].clone())

    def head(self, name: str, embedding: Tensor, tied: bool) -> Linear:
        """The output matrix, of its own or, where tied, the embedding's; packed with both planes at any precision."""
        if tied and self.dense:
            return Linear(embedding)
        return Linear(self._pack(name, self._fetch(name, tuple(embedding.shape)), keep_low=True))

    def _pack(self, name: str, weight: Tensor, keep_low: bool | None = None) -> MatryoshkaWeight | Tensor:
        if self.dense:
            return self._convert(name, weight, self.dense)
        rows, columns = weight.shape
        keep_low = self.precision != "int4" if keep_low is None else keep_low
        packed = self.arena.weight(rows, columns, self.group_size, keep_low)
        if self.device == "meta":
            return packed
        try:
            return pack_matryoshka(weight, self.group_size, name=name, out=packed)
        except ValueError as error:
            raise self.checkpoint.error(f"tensor {error}") from error

    def _vector(self, name: str, size: int) -> Tensor:
        return self._convert(name, self._fetch(name, (size,)), torch.float32)

    def _convert(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous copy, which doesn't hold on to the file."""
        copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if self.device != "meta" and not all(bound.isfinite() for bound in copy.aminmax()):
            raise self.checkpoint.error(f"tensor {name} holds NaN, Inf or a value beyond {dtype}'s range")
        return copy

    def _fetch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as it is stored. The last one is kept, since several parts in a row may come from it."""
        last, tensor = self._last
        if name == last and tensor is not None:
            return tensor
        self._last = ("", None)  # lets go of it before the next one is read
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
        tensor = torch.empty(shape, device="meta") if self.device == "meta" else self.checkpoint.tensor(name)
        self._last = (name, tensor)
        return tensor
