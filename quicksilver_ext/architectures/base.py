"""What a family of models is, and how its parts are taken from a checkpoint."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..weights.arena import Arena
from ..weights.checkpoint import Checkpoint, Fields
from ..weights.gguf import GgufFile
from ..weights.matryoshka import MatryoshkaWeight, check_peak, pack_codes, pack_matryoshka, peak
from ..weights.model import Layer, Linear, Model, Norm, Spec
from .fitting import MATRICES, Fitter

HEAD = "lm_head.weight"
PackRows = Callable[[Tensor, MatryoshkaWeight, str], None]  # some rows, what they fill, the name of the matrix
PIECE_ROWS = 2048  # of a matrix that is read by blocks; a multiple of a panel
MAX_LAYERS = 1 << 16  # far above any model's, and few enough to make a list of
SMALLEST_HALF = 50 * 2.0**-24  # half a step of fp16's subnormal numbers is 1% of this


class Family(ABC):
    """One family: its names in Hugging Face's and in GGUF files, its sizes, its layers. All that is known of it stands
    in its file; docs/adding-a-model.md shows how to write one."""

    model_type: ClassVar[str]  # in config.json
    gguf: ClassVar[str | None] = None  # general.architecture of its GGUF files; None: they come under another's
    root: ClassVar[str]  # what its decoder's tensors begin with
    # GGUF's names of tensors, without their ending and a layer's number, as Hugging Face's; and of metadata keys.
    gguf_tensors: ClassVar[Mapping[str, str]] = {}
    gguf_keys: ClassVar[Mapping[str, str]] = {}
    # Parts of tensors' names whose rows GGUF interleaves (the halves of rotary pairs), with the key of their heads.
    gguf_interleaved: ClassVar[Mapping[str, str]] = {}

    def gguf_config(self, file: GgufFile, names: Mapping[str, str]) -> dict[str, Any]:
        """What Hugging Face's config would say beside ``gguf_keys``. names: Hugging Face's of the file's tensors.
        Raises ValueError for a file that can't be read."""
        return {}

    def transposes(self, name: str) -> bool:
        """Whether Hugging Face has a tensor's matrix as [in, out]; GGUF, GPTQ and AWQ have all of them as [out, in]."""
        return False

    @abstractmethod
    def load(self, checkpoint: Checkpoint, read: Reader) -> Model:
        """The whole model. Raises CheckpointError."""


def _meta(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


class Reader:
    """Takes a model's parts from a checkpoint, in the precision asked for.

    On the device "meta" it is a rehearsal: names and shapes are checked and the arena measures, but nothing is read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        root: str,
        precision: str,
        group_size: int,
        arena: Arena,
        own: bool = False,
        fitter: Fitter | None = None,
        device: str = "cpu",
    ) -> None:
        """``root``: what the names of the decoder's tensors begin with, which files of the bare model leave out.
        ``own``: 4-bit codes that the file has itself are kept. ``fitter``: fits the weights that are packed."""
        self.root, self._names = root, frozenset(checkpoint.names())
        self.checkpoint, self.arena, self.device = checkpoint, arena, device
        self.precision, self.group_size, self.own = precision, group_size, own
        self.dense = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
        self.fitter = fitter if device != "meta" else None
        self._last: tuple[str, Tensor | None] = ("", None)

    def stored(self, name: str) -> str:
        """The name under which the file has a tensor; ``name`` itself where it doesn't."""
        candidates = (name, name.removeprefix(self.root), self.root + name)
        return next((candidate for candidate in candidates if candidate in self._names), name)

    def has(self, name: str) -> bool:
        return self.stored(name) in self._names

    def is_tied(self, name: str, config: Fields, default: bool) -> bool:
        """Whether the embedding ``name`` is the output matrix too. A matrix of the head's own in the file wins over
        what the config says. Of tied ones a file may hold either."""
        if not config.flag("tie_word_embeddings", default):
            return False
        return not (self.has(name) and self.has(HEAD))

    def embedding(self, name: str, rows: int, columns: int, tied: bool) -> Tensor:
        if tied and not self.has(name) and self.has(HEAD):
            name = HEAD
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

    def begin(
        self, spec: Spec, embedding: Tensor, positions: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        """Before the layers. ``rotary``: cosines and sines."""
        if self.fitter is not None:
            self.fitter.begin(spec, embedding, positions, rotary)

    def layer(self, index: int, build: Callable[[], Layer]) -> Layer:
        """The layer that ``build`` takes from here, part by part. Where weights are fitted that is done twice as it
        were: once into fp32, and from there into the arena."""
        if self.fitter is None:
            return build()
        self.dense = torch.float32
        try:
            layer = build()
        finally:
            self.dense = None
        low, out = self.precision != "int4", {}
        for name in MATRICES:
            if (linear := getattr(layer, name)) is not None:
                out[name] = self.arena.weight(linear.out_features, linear.in_features, self.group_size, low)
        try:
            return self.fitter.layer(index, layer, out)
        except ValueError as error:
            raise self.checkpoint.error(f"layer {index}, {error}") from error

    def end(self, norm: Norm, name: str, embedding: Tensor, tied: bool) -> tuple[Norm, Linear]:
        """The final norm and the output matrix, of its own or, where tied, the embedding ``name``; packed with both
        planes at any precision."""
        if tied and self.dense:
            return norm, Linear(embedding)
        rows, columns = embedding.shape
        source = name if tied and self.has(name) else HEAD
        by = pack = None
        if self.fitter is not None:
            parts = self._pieces(self.checkpoint.parts(self.stored(source)))
            norm, by = self.fitter.end(norm, torch.stack([part.abs().amax(0) for part in parts]).amax(0))
            pack = self.fitter.pack_head
        return norm, Linear(self._matrix(source, rows, columns, keep_low=True, by=by, pack=pack))

    def _matrix(
        self,
        name: str,
        rows: int,
        columns: int,
        keep_low: bool | None = None,
        by: Tensor | None = None,
        pack: PackRows | None = None,
    ) -> MatryoshkaWeight | Tensor:
        if self.own and keep_low is None:
            if own := self.checkpoint.four_bits(self.stored(name)):
                return self._pack_own(name, (rows, columns), own)
            keep_low = True  # a file in 4 bits has others where they aren't enough
        parts: Iterable[Tensor]
        if self.dense or self.device == "meta" or name == self._last[0]:
            parts = [self._fetch(name, (rows, columns))]
        else:  # by blocks of rows: as fp32, a matrix of Llama-2-7B is as large as all planes of its layer
            self._check(name, (rows, columns))
            parts = self.checkpoint.parts(self.stored(name))
        if by is not None:
            parts = (part * by for part in self._pieces(parts))
        return self._pack(name, (rows, columns), parts, keep_low, pack)

    @staticmethod
    def _pieces(parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Blocks of rows as fp32, some at a time."""
        return (piece.float() for part in parts for piece in part.split(PIECE_ROWS))

    def _pack(
        self,
        name: str,
        shape: tuple[int, int],
        parts: Iterable[Tensor],
        keep_low: bool | None = None,
        pack: PackRows | None = None,
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
                if pack is not None:
                    pack(part, rows, name)
                else:
                    pack_matryoshka(part, self.group_size, name=name, out=rows, part=True)
            except ValueError as error:
                raise self.checkpoint.error(f"tensor {error}") from error
            start, largest = start + len(part), max(largest, peak(part, rows))
        try:
            check_peak(name, largest)
        except ValueError as error:
            raise self.checkpoint.error(f"tensor {error}") from error
        return packed

    def _pack_own(
        self, name: str, shape: tuple[int, int], parts: Iterable[tuple[Tensor, Tensor, Tensor]]
    ) -> MatryoshkaWeight:
        """A matrix that has 4-bit codes of its own."""
        self._check(name, shape)
        packed = self.arena.weight(*shape, self.group_size, keep_low=False)
        if self.device == "meta":
            return packed
        start = 0
        for codes, scale, offset in parts:
            try:
                pack_codes(codes, None, scale, offset, packed.rows(slice(start, start + len(codes))), name=name)
            except ValueError as error:
                raise self.checkpoint.error(f"tensor {error}") from error
            start += len(codes)
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
        tensor = _meta(shape) if self.device == "meta" else self.checkpoint.tensor(self.stored(name))
        self._last = (name, tensor)
        return tensor

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        try:
            found = self.checkpoint.shape(self.stored(name))
        except KeyError:
            raise self.checkpoint.error(
                f"has no tensor {name}; it is incomplete, or its config describes another model"
            ) from None
        if found != shape:
            raise self.checkpoint.error(
                f"tensor {name} has shape {list(found)}, but the config makes it {list(shape)}; "
                "one of the two belongs to another model"
            )
