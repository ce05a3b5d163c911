"""What a loaded model is: plain dataclasses of tensors, the same for every architecture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .matryoshka import MatryoshkaWeight

# The weights' bits at each precision; "adaptive" has 8 and may use 4 of them.
WEIGHT_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "adaptive": 8}
PRECISIONS = tuple(WEIGHT_BITS)
ACTIVATIONS = ("silu_gated", "gelu_tanh", "gelu", "relu")  # gelu by erf; the gated one has a second matrix, the gate


@dataclass(frozen=True)
class Spec:
    """The sizes and constants of a model. ``family`` is its model_type; ``max_positions`` is the longest context."""

    family: str
    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: str  # one of ACTIVATIONS
    attention_scale: float
    tied_head: bool
    bos_token_id: int | None
    eos_token_ids: list[int]
    pad_token_id: int | None = None
    windows: list[int | None] | None = None  # of each layer: a query sees so many positions, its own included
    scale_by_layer: bool = False  # attention_scale / 1, / 2, / 3 ... from the first layer on

    def window_of(self, layer: int) -> int | None:
        """How many positions, its own included, a query of ``layer`` sees; None: all."""
        return None if self.windows is None else self.windows[layer]

    def attention_scale_of(self, layer: int) -> float:
        """What ``layer``'s scores are multiplied by."""
        return self.attention_scale / (layer + 1 if self.scale_by_layer else 1)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [N, K] of each matrix of a layer, by its field in `Layer`."""
        d, ffn = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        shapes = {"q": (query, d), "k": (key, d), "v": (key, d), "o": (d, query)}
        if self.activation == "silu_gated":
            shapes["gate"] = (ffn, d)
        return shapes | {"up": (ffn, d), "down": (d, ffn)}


@dataclass
class Linear:
    """y = x W^T + bias. ``weight`` is packed, or dense [N, K] in fp32 or bf16; ``bias`` is fp32 [N]."""

    weight: MatryoshkaWeight | Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.out_features if isinstance(self.weight, MatryoshkaWeight) else self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.in_features if isinstance(self.weight, MatryoshkaWeight) else self.weight.shape[1]

    @property
    def macs(self) -> int:
        """Multiply-adds for one row."""
        return self.in_features * self.out_features


@dataclass
class Norm:
    """RMS norm ("rms") or layer norm ("layer") over the hidden size; weight and bias are fp32 [d]."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass
class Layer:
    """One decoder layer. ``gate`` is there for "silu_gated" only."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    q_norm: Norm | None = None  # of each head on its own, before the rotary embedding
    k_norm: Norm | None = None

    def norms(self) -> list[Norm]:
        """Those that there are."""
        return [value for value in vars(self).values() if isinstance(value, Norm)]

    def linears(self) -> list[Linear]:
        """Those that there are."""
        every = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        return [linear for linear in every if linear is not None]


@dataclass
class Model:
    """A model in memory.

    embedding             [vocab, d]: fp32, bf16, or fp16 for packed precisions; rows are looked up, then widened
    position_embedding    fp32 [max_positions, d], or None
    rotary_cos/sin        fp32 [max_positions, head_size / 2], with any attention factor of the scaling in; or None
    precision             "fp32" and "bf16": dense matrices; "int8" and "adaptive": both planes; "int4": the high plane,
                          except the head's, which has both. 4-bit codes of a file's own have no low plane at all
    The planes of a packed model are views of one arena.
    """

    spec: Spec
    embedding: Tensor
    position_embedding: Tensor | None
    layers: list[Layer]
    final_norm: Norm
    head: Linear
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    precision: str
    group_size: int

    @property
    def has_own_codes(self) -> bool:
        """Whether a matrix has 4-bit codes that were made elsewhere: then 8 bits have no more to give."""
        weights = (linear.weight for layer in self.layers for linear in layer.linears())
        own = (isinstance(weight, MatryoshkaWeight) and weight.lo is None for weight in weights)
        return self.precision in ("int8", "adaptive") and any(own)

    def to(self, device: torch.device) -> Model:
        """The same model with its tensors on a device; itself where they are there. A tied head stays tied."""
        if self.embedding.device == device:
            return self
        moved: dict[int, Tensor] = {}

        def move(part: Any) -> Any:
            if isinstance(part, Tensor):
                return moved.setdefault(id(part), part.to(device))
            if isinstance(part, list):
                return [move(each) for each in part]
            if dataclasses.is_dataclass(part) and not isinstance(part, (Spec, type)):
                fields = {field.name: move(getattr(part, field.name)) for field in dataclasses.fields(part)}
                return dataclasses.replace(part, **fields)
            return part

        return cast(Model, move(self))
