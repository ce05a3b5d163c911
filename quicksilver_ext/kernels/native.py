"""What the compiled stages take, made of ours: structs of addresses, 0 for None.

Nothing here keeps a tensor alive: whoever makes a struct holds on to what it points at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _C

if TYPE_CHECKING:
    from ..engine.kv_cache import LayerCache
    from ..mechanisms.base import Rows
    from ..weights.model import Linear, Model, Norm

KV_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8"}


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_norm(norm: Norm) -> Any:
    return _C.Norm(norm.kind, pointer(norm.weight), pointer(norm.bias), norm.eps)


def native_linear(linear: Linear) -> Any:
    weight: Any = linear.weight
    native = _C.MatryoshkaWeight(
        hi=pointer(weight.hi),
        lo=pointer(weight.lo),
        scale=pointer(weight.scale),
        offset=pointer(weight.offset),
        n=weight.out_features,
        k=weight.in_features,
        group=weight.group_size,
    )
    return _C.Linear(native, pointer(linear.bias))


def native_layer(model: Model, index: int) -> Any:
    spec, layer, native = model.spec, model.layers[index], _C.Layer()
    native.d, native.heads, native.kv_heads = spec.hidden_size, spec.num_heads, spec.num_kv_heads
    native.head_size, native.ffn, native.activation = spec.head_size, spec.intermediate_size, spec.activation
    native.attention_norm, native.mlp_norm = native_norm(layer.attention_norm), native_norm(layer.mlp_norm)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        if (linear := getattr(layer, name)) is not None:
            setattr(native, name, native_linear(linear))
    for name in ("q_norm", "k_norm"):
        if (norm := getattr(layer, name)) is not None:
            setattr(native, name, native_norm(norm))
    native.cosine, native.sine = pointer(model.rotary_cos), pointer(model.rotary_sin)
    native.attention_scale = spec.attention_scale_of(index)
    return native


def native_cache(cache: LayerCache) -> Any:
    native = _C.KvCache()
    native.key, native.value = cache.key.data_ptr(), cache.value.data_ptr()
    native.key_scale, native.value_scale = pointer(cache.key_scale), pointer(cache.value_scale)
    native.type = KV_TYPES[cache.key.dtype]
    native.blocks, native.kv_heads, native.block_size, native.head_size = cache.key.shape
    native.block_table = cache.block_table.data_ptr()
    native.sequences, native.max_blocks = cache.block_table.shape
    native.lengths, native.positions = cache.lengths.data_ptr(), cache.positions.data_ptr()
    native.until, native.blocks_used = pointer(cache.until), cache.blocks_used.data_ptr()
    native.free_blocks, native.window = cache.free_blocks.data_ptr(), cache.window
    native.overflow = pointer(cache.overflow)
    return native


def point(native: Any, rows: Rows, active: torch.Tensor) -> None:
    """Makes a _C.Rows stand for the rows active [n] int32 of ``rows``."""
    native.hidden, native.rows = rows.hidden.data_ptr(), len(rows.hidden)
    native.positions, native.sequence = rows.positions.data_ptr(), rows.sequence.data_ptr()
    native.bits = pointer(rows.bits)
    native.active, native.count = active.data_ptr(), len(active)
    native.slots = 0
